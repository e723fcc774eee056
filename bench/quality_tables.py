"""What `quality.py` measures: of each table the methods, and settings by their names."""

from __future__ import annotations

from typing import Any

GRADIENT = ("taylor", "smoothgrad", "moreau", "moreau-gs")
UNITS = ("random", "magnitude", *GRADIENT, "wanda", "wanda-sp", "flap", "thinet", "gblm")
MIDDLE, EVERYWHERE = {"layers": [4, 28]}, [0, 30]
UNITS_AS: dict[str, dict[str, Any]] = {"": {}, " all layers": {"layers": EVERYWHERE}}
UNITS_AS |= {f"{variant} compensated": more | {"compensate": True} for variant, more in UNITS_AS.items()}
UNITS_AS |= {" global": {"allocation": "global"}}
STARTS = {
    name: {"init": name, "repaired": "no"} for name in ("wanda-sp", "flap", "thinet", "taylor", "random-progressive")
}
MORE = {f"{n} steps": {"steps": n} for n in (1200, 2400)}
MORE |= {"repaired": {"repaired": "yes"}, **{f"{n} a pass": {"per_pass": n} for n in (8, 64)}}
STARTS |= {f"{start}, {what}": STARTS[start] | more for start in STARTS for what, more in MORE.items()}
# Table -> methods and their settings; those of one method share its scores where layers and granularity agree.
TABLES: dict[str, tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "main": (
        ("random", "magnitude", *GRADIENT),
        {
            "channels": {"ratio": 0.25, **MIDDLE},
            "both": {**MIDDLE, "attention_ratio": 0.34, "mlp_ratio": 0.25},
            "stock 0.2": {"ratio": 0.2, "stock": True},
            "stock 0.25": {"ratio": 0.25, "stock": True},
        },
    ),
    "units": (
        UNITS,
        {
            f"{ratio:.0%}{variant}": {"ratio": ratio, **MIDDLE, **more}
            for variant, more in UNITS_AS.items()
            for ratio in (0.2, 0.3, 0.4, 0.5)
        },
    ),
    "policy": (
        ("bernoulli",),
        {
            f"{ratio:.0%} {start}{', all layers' if everywhere else ''}{', compensated' if repaired else ''}": {
                "ratio": ratio,
                "layers": EVERYWHERE if everywhere else MIDDLE["layers"],
                "compensate": repaired,
                "samples": 128 if settings["init"] == "random-progressive" else 512,  # or its budget falls too late
                "settings": settings,
            }
            for start, settings in STARTS.items()
            for everywhere in (False, True)
            for ratio in (0.2, 0.3, 0.4, 0.5)
            for repaired in (False, True)
        },
    ),
    "weights": (
        ("magnitude", "wanda", "gblm", "sparsegpt"),
        {"50%": {"granularity": "weights"}, "2:4": {"granularity": "2:4"}, "4:8": {"granularity": "4:8"}},
    ),
    "layers": (
        ("random", "magnitude", "taylor", "layer-ppl", "block-influence"),
        {
            f"{count} layers{', ' + name if name else ''}": {
                **MIDDLE,
                "granularity": "layers",
                "ratio": count / 24,
                **more,
            }
            for name, more in (
                ("", {}),
                ("contiguous", {"contiguous": True}),
                ("compensated", {"compensate": True}),
            )
            for count in (1, 3, 6, 9)
        },
    ),
    "compensate": (
        ("taylor",),
        {
            f"{target} {tokens} λ={ridge}": {
                "ratio": 0.25,
                **MIDDLE,
                "compensate": True,
                "compensate_target": target,
                "compensate_tokens": tokens,
                "compensate_ridge": ridge,
            }
            for target in ("own", "stream")
            for tokens in (8192, 32768, 65536, 131072)
            for ridge in (0.001, 0.01, 0.1)
        }
        | {"stream 65536 default": {"ratio": 0.25, **MIDDLE, "compensate": True}},
    ),
    "dtypes": (
        ("taylor", "moreau-gs", "wanda-sp", "wanda", "sparsegpt"),
        {
            f"{what}, {dtype}": {"samples": 16, **options, "dtype": dtype}
            for what, options in (
                ("20 % of units", {"ratio": 0.2, **MIDDLE}),
                ("20 %, repaired", {"ratio": 0.2, **MIDDLE, "compensate": True, "compensate_tokens": 8192}),
                ("50 % of weights", {"granularity": "weights"}),
            )
            for dtype in ("float32", "bfloat16")
        },
    ),
}
