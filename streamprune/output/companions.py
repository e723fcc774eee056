"""Companions of the tensors: which of the source's other files come along, and config.json, which is made anew.

Files come along by name: tokenizers, templates, processors, terms of use, and what code that comes along names. All
else stays behind: what a training left there, weights in other formats, data.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from streamprune.errors import CheckpointError
from streamprune.output.form import OutputForm
from streamprune.storage.checkpoint import read_config, read_json
from streamprune.storage.directory import OWN_FILE, write_json
from streamprune.texts.tokenizer import load_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
# In lower case. Vocabularies go by many names, some of them with a version at the end.
TOKENIZERS = (
    *("tokenizer*.json", "tokenizer.model*", "tekken*.json", "added_tokens.json", "special_tokens*.json"),
    *("*vocab*.json", "*vocab*.txt", "merges*.txt", "encoder.json", "dict.txt", "emoji.json", "byte_maps.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.vocab", "*.tokenizer", "bpe.*"),
)
OTHERS = (
    *("chat_template*", "*.jinja", "*processor_config.json", "audio_tokenizer_config.json", "generation_config*.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)
TERMS = ("*licen[cs]e*", "*notice*", "*use_policy*", "*use-policy*", "copying*", "*terms_of_use*")
TERMS_SUFFIXES = ("", ".txt", ".md", ".rst", ".html", ".pdf")
# Sub-directories that transformers and sentence-transformers read, and what of them.
DIRECTORIES = {"additional_chat_templates": ("*.jinja",), "[0-9]*_[A-Z]*": ("*.json", "*.txt", "*.safetensors")}
CODE_DIRECTORY = "custom_generate"  # of `generate`
# A sub-directory with one of these is a model or an adapter of its own, such as a training's checkpoints.
OF_ITS_OWN = ("config.json", "adapter_config.json", "trainer_state.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
MADE_ANEW = ("config.json", "README.md", OWN_FILE)


@dataclass(frozen=True)
class Companions:
    """Files that come along from a model directory, decided before any layer is read.

    Attributes:
        source: the directory.
        copied: files below it, as they are.
        edited: JSON files that are written with other contents, by name.
        auto_map: what config.json still says of code, where its layout is one that the code knows.
        license: licence that the source's model card names.
        notes: what is to be said of all this, a line each.
    """

    source: Path
    copied: tuple[str, ...] = ()
    edited: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    auto_map: Mapping[str, Any] = field(default_factory=dict)
    license: Any = None
    notes: tuple[str, ...] = ()

    def write(
        self, config: Mapping[str, Any], directory: Path, *, files: Mapping[str, str], link: bool = False
    ) -> None:
        """Write everything beside the weights, with these contents of config.json; with `link`, links for copies.

        Args:
            files: texts of files that the output's form brings; its config then names them, and no others.
        """
        for name in self.copied:
            (directory / name).parent.mkdir(exist_ok=True)
            if link:
                (directory / name).symlink_to((self.source / name).absolute())
            else:
                shutil.copyfile(self.source / name, directory / name)
        for name, contents in self.edited.items():
            write_json(directory / name, contents)
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        fields = dict(config)
        if "auto_map" in fields and not files:
            fields.pop("auto_map")
            fields |= {"auto_map": dict(self.auto_map)} if self.auto_map else {}
        write_json(directory / "config.json", fields)


def prepare(form: OutputForm, *, trust_remote_code: bool = False) -> Companions:
    """Decide what comes along with an output; a file that cannot be read costs no more than a note."""
    checkpoint = form.skeleton.checkpoint
    source, named = checkpoint.path, checkpoint.config.get("auto_map")
    search = _Search(source, trust_remote_code)
    search.take(_named_files(source))
    auto_map: dict[str, Any] = {}
    if form.keeps_code:
        auto_map = search.code("config.json", named) or {}
    elif named != form.config().get("auto_map"):  # those of an earlier run of ours are the same
        search.replace(named)
    search.edit()
    found = Companions(
        source,
        tuple(sorted(search.files - search.edited.keys())),
        search.edited,
        auto_map,
        search.license(),
        tuple(search.notes),
    )
    return _keep_tokenizer_class(found, form, trust_remote_code)


def _named_files(source: Path) -> Iterator[str]:
    """Yield the files below `source` whose names say that they are needed."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in MADE_ANEW:
            continue
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in _of_directory(path))
        elif _is_named(path.name):
            yield path.name


def _of_directory(path: Path) -> list[str]:
    try:
        names = sorted(file.name for file in path.iterdir() if not file.is_dir())
    except OSError:
        return [""]  # the directory itself, which cannot be read
    for directory, patterns in DIRECTORIES.items():
        if fnmatchcase(path.name, directory):
            return [name for name in names if _matches(name, patterns)]
    if TOKENIZER_CONFIG in names and not set(OF_ITS_OWN) & set(names):
        return [name for name in names if _matches(name, TOKENIZERS + OTHERS)]
    return []


def _is_named(name: str) -> bool:
    if name.lower().endswith((".index.json", "_results.json")):
        return False
    is_terms = _matches(name, TERMS) and Path(name).suffix.lower() in TERMS_SUFFIXES
    return is_terms or _matches(name, TOKENIZERS + OTHERS)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


class _Search:
    """Search for files to come along, and notes on it."""

    def __init__(self, source: Path, trust_remote_code: bool) -> None:
        self.source, self.trusted = source, trust_remote_code
        self.files: set[str] = set()
        self.edited: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def take(self, names: Iterable[str]) -> None:
        """Take the files that can be read, and note those that cannot."""
        for name in names:
            try:
                with (self.source / name).open("rb") as stream:
                    stream.read(1)
                self.files.add(name)
            except OSError as error:
                self.notes.append(f"{name} cannot be read ({error.strerror}); it does not come along")

    def edit(self) -> None:
        """Take the files that JSON names; take the code that it names where it is trusted, else name it no more."""
        for name in sorted(self.files):
            if name.endswith("_config.json") and "/" not in name:
                try:
                    contents = read_json(self.source / name)
                except CheckpointError as error:
                    self.notes.append(f"{error}; it is copied as it is")
                    continue
                self.take(self._there(value for value in contents.values() if isinstance(value, str)))
                named = contents.pop("auto_map", None)
                entries = self.code(name, named)
                if entries != named:
                    self.edited[name] = contents | ({"auto_map": entries} if entries else {})
        if self.trusted and (self.source / CODE_DIRECTORY).is_dir():
            code = [file for file in (self.source / CODE_DIRECTORY).iterdir() if file.suffix in (".py", ".txt")]
            self.take(f"{CODE_DIRECTORY}/{file.name}" for file in sorted(code))

    def code(self, file: str, auto_map: Any) -> Any:
        """Return what remains of an `auto_map`: a class per auto class, or a list of two for tokenizers."""
        if isinstance(auto_map, dict):
            kept = {auto: self.code(file, entry) for auto, entry in auto_map.items()}
            return {auto: entry for auto, entry in kept.items() if entry is not None}
        if isinstance(auto_map, list | tuple):
            entries = [self.code(file, entry) for entry in auto_map]
            return entries if any(entries) else None
        if auto_map is None or "--" in str(auto_map):  # of another repository
            return auto_map
        modules = self._modules(str(auto_map))
        if self.trusted and modules:
            self.take(modules)
            return auto_map
        why = "is not there" if self.trusted else "comes along with --trust-remote-code only"
        note = f"{file} names code of its own, {auto_map}, which {why}; its entry is left out"
        if note not in self.notes:
            self.notes.append(note)
        return None

    def replace(self, auto_map: Any) -> None:
        """Say that the output has classes of its own in the place of the source's."""
        if auto_map:
            self.notes.append(
                "config.json names code of its own, which does not know these layers; its entry is left out"
            )

    def _modules(self, reference: str) -> list[str]:
        """List the files of `module.Class`, with the modules beside it that it imports; none if one is missing."""
        from transformers.dynamic_module_utils import get_relative_imports

        if not re.fullmatch(r"\w+\.\w+", reference):  # a path could lead out of the directory
            return []
        files, todo = [], [f"{reference.split('.')[0]}.py"]
        while todo:
            name = todo.pop()
            files.append(name)
            try:
                imports = get_relative_imports(self.source / name)
                text = (self.source / name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return []
            todo += [f"{module}.py" for module in imports if module.isidentifier() and f"{module}.py" not in files]
            if self.trusted:
                self.take(self._there(re.findall(r"[\"']([^\"'\n]+)[\"']", text)))
        return files

    def _there(self, names: Iterable[str]) -> list[str]:
        """Choose the names that are plain names of files beside config.json, and no weights."""
        return [
            name
            for name in names
            if re.fullmatch(r"[\w.-]+", name)
            and name not in MADE_ANEW
            and not name.startswith(".")
            and not name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
            and (self.source / name).is_file()
        ]

    def license(self) -> Any:
        """Return the licence that the front matter of the source's model card names, if it has one."""
        card = self.source / "README.md"
        if not card.is_file():
            return None
        import yaml
        from huggingface_hub import metadata_load

        try:
            license = (metadata_load(card) or {}).get("license")
            names = license if isinstance(license, list) else [license]
            return license if all(isinstance(name, str) for name in names) else None
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:100]
            self.notes.append(f"README.md cannot be read ({reason}); the new card names no licence")
            return None


def _keep_tokenizer_class(found: Companions, form: OutputForm, trust_remote_code: bool) -> Companions:
    """Name the tokenizer's class where the output's model_type would make AutoTokenizer choose another one.

    That choice goes by model_type for some families, and another class can split the same text differently.
    """
    config = form.config()
    has_config = TOKENIZER_CONFIG in {*found.copied, *found.edited}
    if not has_config or read_config(found.source).get("model_type") == config.get("model_type"):
        return found
    try:
        dense = type(load_tokenizer(found.source, trust_remote_code=trust_remote_code)).__name__
        with tempfile.TemporaryDirectory(prefix="streamprune-tokenizer-") as scratch:
            found.write(config, Path(scratch), files=form.files(), link=True)
            pruned = type(load_tokenizer(Path(scratch), trust_remote_code=trust_remote_code)).__name__
        contents = found.edited.get(TOKENIZER_CONFIG) or read_json(found.source / TOKENIZER_CONFIG)
    except CheckpointError as error:
        note = f"the tokenizer is copied as it is, though it may load as another class: {error}"
        return replace(found, notes=(*found.notes, note))
    if pruned == dense:
        return found
    edited = {**found.edited, TOKENIZER_CONFIG: contents | {"tokenizer_class": dense}}
    return replace(found, copied=tuple(name for name in found.copied if name not in edited), edited=edited)
