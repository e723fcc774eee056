"""llama.cpp, as the tests ask it: log-probabilities and greedy tokens of a GGUF file."""

import math

import pytest
import torch

PRINTABLE = 0  # a token of the tests' vocabulary that is text by itself


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp with a cache in float32."""

    def __init__(self, path, n_ctx=256):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = n_ctx
        params.n_parallel, params.cpuparams.n_threads, params.verbosity, params.warmup = 1, 1, 0, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def prompt_tokens(self, text):
        """How many tokens a text has."""
        return self._server.handle_completions({"prompt": text, "n_predict": 1})["usage"]["prompt_tokens"]

    def next_token(self, ids, size):
        """Log-probabilities of the token after `ids`, or a text: [size]."""
        # What is generated has to be text, or nothing is said of it; the probabilities are those before any bias.
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": size, "logit_bias": [[PRINTABLE, 1000.0]]}
        (said,) = self._server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        row = torch.full((size,), -math.inf)
        for each in said["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        return row

    def log_probabilities(self, ids, size):
        """Those after each of the prefixes of `ids`: [len(ids), size]."""
        return torch.stack([self.next_token(ids[:end], size) for end in range(1, len(ids) + 1)])

    def greedy(self, ids, count, size):
        """The most likely tokens that follow, one after another."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.next_token(ids, size).argmax()))
        return ids[-count:]
