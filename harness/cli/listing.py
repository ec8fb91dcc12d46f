"""`ditbench list …`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import torch
import yaml

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF, options
from ditbench.harness.fitting import registry
from ditbench.harness.quant.quantizers import ActQuant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import FLOAT_BITS, FP8, Bits, QuantSpec, all_labels, parse_label

FORMATS = ("W8A8", "FP8", "W6A6", "W4A8", "W4A4", "W3A4", "W8A16", "W4A16")


def list_methods() -> str:
    rows = []
    for name in registry.known_methods():
        params = asdict(registry.method(name).Params())
        rows.append(
            (name, registry.summary(name), _formats(name), ", ".join(f"{k}={v}" for k, v in params.items()) or "–")
        )
    return table(("method", "what", "formats", "parameters"), rows)


def list_models() -> str:
    rows = []
    for path in options("model"):
        comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        rows.append((path.stem, " ".join(comment)))
    return table(("model", "what"), rows)


def list_metrics() -> str:
    from ditbench.eval.base import known_metrics

    rows = [
        (m.name, m.summary, _direction(m.better), "per sample against the float model" if m.paired else "per set")
        for m in known_metrics().values()
    ]
    return table(("metric", "what", "direction", "kind"), rows)


def _direction(better: str) -> str:
    return "ranks nobody" if better == "none" else f"{better} is better"


def list_backends() -> str:
    """Every backend, and the format × device matrix: why a format has no kernel here."""
    from ditbench.harness.backends.base import known_backends

    backends = known_backends()
    # Not the word "measured": that is a record's, of a run in which the kernel ran.
    rows = [(b.NAME, "real" if b.KIND == "measured" else b.KIND, b.SUMMARY) for b in backends.values()]
    return table(("backend", "arithmetic", "what"), rows) + "\n\n" + format_matrix()


def format_matrix() -> str:
    from ditbench.harness.backends.base import known_backends

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows: list[Sequence[str]] = []
    for label in FORMATS:
        recipe = example_recipe(label)
        for device in devices:
            real = [(b, b.unsupported(recipe, device)) for b in known_backends().values() if b.KIND == "measured"]
            able = [b.NAME for b, why in real if why is None]
            why = "; ".join(reason for _, reason in real if reason)  # each begins with the backend's name
            rows.append((label, device.type, ", ".join(able) or "simulated", "" if able else why))
    return table(("format", "device", "runs on", "why not"), rows)


def list_protocols() -> str:
    rows = []
    for path in options("protocol"):
        comment = [
            line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line
        ]
        rows.append((path.stem, " ".join(comment)))
    return table(("protocol", "what"), rows)


def list_prompts() -> str:
    """The sets shipped here, and those that `ditbench data fetch` gets."""
    from ditbench.eval.data import PROMPTS, known_data
    from ditbench.harness.stages.prompt_sets import SETS

    rows = [(name, "here", each.what) for name, each in SETS.items()]
    rows += [(d.name, "here" if d.is_here else "–", d.what) for d in known_data().values() if d.kind == PROMPTS]
    text = table(("prompts", "here", "what"), rows)
    return f"{text}\n\nor a file of your own: .txt, .jsonl, .json, .yaml or .tsv (protocol.prompts=FILE)"


def list_bits() -> str:
    defaults = yaml.safe_load((CONF / "bits" / "default.yaml").read_text())
    sides = [
        f"{side}: " + ", ".join(f"{k}={v}" for k, v in defaults[side].items() if k != "bits")
        for side in ("weight", "act")
    ]
    return f"{' '.join(all_labels())}\ndefaults (conf/bits/default.yaml):\n  " + "\n  ".join(sides)


KINDS: dict[str, Callable[[], str]] = {
    "methods": list_methods,
    "models": list_models,
    "metrics": list_metrics,
    "backends": list_backends,
    "protocols": list_protocols,
    "prompts": list_prompts,
    "bits": list_bits,
}


def bits_of(label: str) -> Bits:
    """A format in the default granularity: per channel, per token dynamic, symmetric."""
    weight, act, number = parse_label(label)
    return Bits(
        QuantSpec(weight, "per_channel", number=number) if weight < FLOAT_BITS else None,
        QuantSpec(act, "per_token", dynamic=True, number=number) if act < FLOAT_BITS else None,
    )


def example_recipe(label: str) -> LayerRecipe:
    from ditbench.harness.quant.quantizers import quantize_weight

    bits = bits_of(label)
    weight = None if bits.weight is None else quantize_weight(torch.eye(16), bits.weight)
    return LayerRecipe(weight=weight, act=None if bits.act is None else ActQuant(bits.act))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(str(cell).ljust(w) for cell, w in zip(line, widths, strict=False)), str(line[-1])]).rstrip()
        for line in lines
    )


def formats_of(name: str) -> list[str]:
    """Of FORMATS, those that the method defines."""
    defined = []
    for label in FORMATS:
        try:
            registry.check_bits(name, bits_of(label))
            defined.append(label)
        except UserError:
            continue
    return defined


def _formats(name: str) -> str:
    if name == registry.FLOAT:
        return "16-bit"
    defined = formats_of(name)
    if len(defined) == len(FORMATS):
        return "any"
    return "any integers" if defined == [label for label in FORMATS if label != FP8.upper()] else " ".join(defined)
