"""Open-Sora 1.2 (Zheng et al., arXiv:2412.20404): adaLN-single blocks with a caption each, within frames and across them in turn.

Rows of scale_shift_table as in PixArt, added to `e`, which both kinds of block get from one `t_block`. Blocks take the whole
video and lay it out themselves, so the state between blocks is one tensor. q, k and v are one layer, and so are k and v of the
caption: a fold of V goes into their last rows. The embedding of patches is a 3-D convolution and always stays in float.

A folder is either a pipeline that we saved, or three downloads side by side: transformer/, vae/ and text_encoder/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.checkpoint import Checkpoint
from ditbench.harness.models.families.opensora.checkpoint import CONFIG, TEXT_ENCODER, VAE, WEIGHTS, pipeline_of
from ditbench.harness.models.families.opensora.pipeline import OpenSoraPipeline
from ditbench.harness.models.prompted import PipelineFamily
from ditbench.harness.models.sites import reads, table
from ditbench.harness.quant.target import Site, ValueRows

HEIGHT, WIDTH, FRAMES = 240, 426, 51  # configs/opensora-v1-2/inference/sample.py of its authors
PARTS = ("transformer", "vae", "text_encoder")


def sites(transformer: nn.Module) -> list[Site]:
    width = transformer.config.hidden_size
    found = []
    for index in range(len(transformer.spatial_blocks)):
        for kind in ("spatial_blocks", "temporal_blocks"):
            block = f"{kind}.{index}"
            own_values = ValueRows(f"{block}.attn.qkv", slice(2 * width, 3 * width))
            caption_values = ValueRows(f"{block}.cross_attn.kv_linear", slice(width, 2 * width))
            found += [
                reads("attn_in", block, ("attn.qkv",), table(block, "e", 0, 1)),
                reads("attn_out", block, ("attn.proj",), own_values),
                reads("cross_query", block, ("cross_attn.q_linear",)),
                reads("caption", block, ("cross_attn.kv_linear",)),
                reads("cross_out", block, ("cross_attn.proj",), caption_values),
                reads("ff_in", block, ("mlp.fc1",), table(block, "e", 3, 4)),
                reads("ff_mid", block, ("mlp.fc2",)),
            ]
    return found


def call(pipe: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}


@dataclass(frozen=True)
class OpenSoraFamily(PipelineFamily):
    def load(self, checkpoint: Checkpoint) -> OpenSoraPipeline:
        if not checkpoint.plain:
            raise UserError(
                "Open-Sora is read from its three folders only; leave model.variant and model.transformer out"
            )
        folder, dtype = Path(checkpoint.source.where), checkpoint.dtype
        if (folder / "model_index.json").exists():
            pipe = OpenSoraPipeline.from_pretrained(folder, dtype=dtype)
            self._check(pipe)
            return pipe
        if checkpoint.source.local:
            return pipeline_of(*_parts(folder), dtype)
        return pipeline_of(*_downloaded(checkpoint.source.where, checkpoint.revision), dtype)

    def folders(self, checkpoint: Checkpoint) -> dict[str, Path] | None:
        """Where each part is on this machine, unless a pipeline's index says it."""
        folder = Path(checkpoint.source.where)
        if (folder / "model_index.json").exists():
            return None
        found = (
            _parts(folder)
            if checkpoint.source.local
            else _downloaded(checkpoint.source.where, checkpoint.revision, local_only=True)
        )
        return dict(zip(PARTS, found, strict=True))


def _parts(folder: Path) -> list[Path]:
    missing = [part for part in PARTS if not (folder / part / CONFIG).exists()]
    if missing:
        raise UserError(f"{folder}: no {CONFIG} in {', '.join(missing)}; {_how_to_fetch('…')}")
    return [folder / part for part in PARTS]


def _downloaded(transformer: str, revision: str | None, local_only: bool = False) -> list[Path]:
    """All three from the hub, or from its cache (local_only); `revision` is the transformer's."""
    files, where = [CONFIG, WEIGHTS], {"local_files_only": local_only}
    try:
        return [
            Path(snapshot_download(transformer, revision=revision, allow_patterns=files, **where)),
            Path(snapshot_download(VAE, allow_patterns=files, **where)),
            Path(snapshot_download(TEXT_ENCODER, **where)),
        ]
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise UserError(
            f"{transformer} is no folder here, and cannot be downloaded from the hub now, or {VAE} or {TEXT_ENCODER} "
            f"cannot.\n{_how_to_fetch(transformer)}"
        ) from error


def _how_to_fetch(transformer: str) -> str:
    sources = zip(PARTS, (transformer, VAE, TEXT_ENCODER), strict=True)
    commands = "; ".join(f"hf download {source} --local-dir ./weights/opensora/{part}" for part, source in sources)
    return f"Where there is a network: `{commands}`; then add model.source=./weights/opensora"


FAMILY = OpenSoraFamily(
    pipelines=("OpenSoraPipeline",),
    transformer="STDiT3",
    lists=("spatial_blocks", "temporal_blocks"),
    in_turn=True,
    attention_modules=("attn", "cross_attn"),
    INDEX=f"transformer/{CONFIG}",
    sites=sites,
    call=call,
)
