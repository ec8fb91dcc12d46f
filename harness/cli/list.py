"""`ditbench list …`: what there is to choose from."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import asdict

import yaml

from ditbench.harness.backends.matrix import format_matrix
from ditbench.harness.cli.flags import Parser
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF, options
from ditbench.harness.common.terminal import columns
from ditbench.harness.common.text_table import table
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT, Form
from ditbench.harness.quant.spec import FORMATS, NAMED, bits_of, integer_labels, needs_integers


def list_methods() -> str:
    """Every method with its forms and parameters, and what each form sets."""
    rows, parameters, forms = [], [], []
    for name in registry.known_methods():
        params = asdict(registry.method(name).Params())
        own = registry.forms_of(name)
        rows.append((name, _formats(name), ", ".join(own), registry.summary(name)))
        if params:
            parameters.append((name, ", ".join(f"{k}={v}" for k, v in params.items())))
        forms += [(name, form, _sets(its)) for form, its in own.items() if form != DEFAULT]
    return "\n\n".join(
        [
            table(("method", "formats", "forms", "what"), rows),
            f"method={registry.EXTERNAL} method.path=FOLDER: a transformer that somebody else quantized, or samples of one (docs/external.md)",
            "parameters: method.NAME=VALUE sets one",
            table(("method", "parameters and their defaults"), parameters),
            "forms: method.form=NAME sets these; what is set by hand is stronger",
            table(("method", "form", "sets"), forms),
        ]
    )


def _sets(form: Form) -> str:
    named = {f"method.{name}": value for name, value in form.params.items()} | dict(form.settings)
    return " ".join(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in named.items()) or "nothing"


def list_models() -> str:
    rows = []
    for path in options("model"):
        comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        rows.append((path.stem, " ".join(comment)))
    return table(("model", "what"), rows)


def list_metrics() -> str:
    from ditbench.eval.base import known_metrics

    rows = [
        (m.name, _direction(m.better), "per sample" if m.paired else "per set", m.summary)
        for m in known_metrics().values()
    ]
    of = "per sample: against the float model's sample of the same noise; per set: of all samples together"
    return f"{table(('metric', 'direction', 'of', 'what'), rows)}\n\n{of}"


def _direction(better: str) -> str:
    return "ranks nobody" if better == "none" else f"{better} is better"


def list_backends() -> str:
    """Every backend, and the format × device matrix: why a format has no kernel here."""
    from ditbench.harness.backends.base import known_backends

    backends = known_backends()
    # Not the word "measured": that is a record's, of a run in which the kernel ran.
    rows = [(b.NAME, "real" if b.KIND == "measured" else b.KIND, b.SUMMARY) for b in backends.values()]
    return table(("backend", "arithmetic", "what"), rows) + "\n\n" + format_matrix()


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
    from ditbench.eval.data import PROMPTS, find_data, known_data
    from ditbench.harness.stages.prompt_sets import SETS

    rows = [
        (name, "here" if each.needs is None or find_data(each.needs).is_here else "–", each.what)
        for name, each in SETS.items()
    ]
    rows += [(d.name, "here" if d.is_here else "–", d.what) for d in known_data().values() if d.kind == PROMPTS]
    text = table(("prompts", "here", "what"), rows)
    return f"{text}\n\nor a file of your own: .txt, .jsonl, .json, .yaml or .tsv (protocol.prompts=FILE)"


def list_bits() -> str:
    defaults = yaml.safe_load((CONF / "bits" / "default.yaml").read_text())

    def plain(value: object) -> object:
        """What holds where the method's form says nothing."""
        found = re.fullmatch(r"\$\{form:[^,]+,(.+)\}", str(value))
        return found[1] if found else value

    sides = [
        f"{side}: " + ", ".join(f"{k}={plain(v)}" for k, v in defaults[side].items() if k != "bits")
        for side in ("weight", "act")
    ]
    labels = textwrap.fill(" ".join([*integer_labels(), *NAMED]), columns())
    formats = table(("format", "weights", "activations"), [(label, *_told(label)) for label in NAMED])
    mixtures = "w<one>_a<other>: one of these (or a number of bits) for each side, such as wnvfp4_afp8, wmxfp4_amxfp8, wnvfp4_a16"
    defaults_told = "\n  ".join(sides)
    return (
        f"{labels}\ndefaults (conf/bits/default.yaml):\n  {defaults_told}\n\n"
        f"formats by name; bits.weight.rule=floor and the like set one part:\n{formats}\n{mixtures}"
    )


KINDS: dict[str, Callable[[], str]] = {
    "methods": list_methods,
    "models": list_models,
    "metrics": list_metrics,
    "backends": list_backends,
    "protocols": list_protocols,
    "prompts": list_prompts,
    "bits": list_bits,
}


def _formats(name: str) -> str:
    if name == registry.FLOAT:
        return "16-bit"
    defined = registry.formats_of(name)
    if len(defined) == len(FORMATS):
        return "any"
    return "any integers" if defined == [label for label in FORMATS if _is_of_integers(label)] else " ".join(defined)


def _is_of_integers(label: str) -> bool:
    bits = bits_of(label)
    try:
        needs_integers("", bits.weight, bits.act)
    except UserError:
        return False
    return True


def _told(label: str) -> tuple[str, str]:
    bits = bits_of(label)
    assert bits.weight is not None and bits.act is not None
    return bits.weight.told, bits.act.told


def command(arguments: list[str]) -> int:

    parser = Parser(prog="ditbench list", description="What there is to choose from.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--debug", action="store_true")
    print(KINDS[parser.parse_args(arguments).kind]())
    return 0
