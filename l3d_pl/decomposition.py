"""A finished decomposition, to keep, to share and to use."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l3d_pl.batch_topk import at_threshold, batch_topk
from l3d_pl.divergence import DivergenceLike, make_divergence
from l3d_pl.errors import L3DError
from l3d_pl.gradients import GradientExtractor
from l3d_pl.provenance import provenance
from l3d_pl.subnetworks import Prepared, Subnetworks
from l3d_pl.targets.frozen import fingerprint, freeze, select_parameters

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONFIG_KEYS = (
    *("n_subnetworks", "parameters", "divergence", "reference", "sample", "k", "threshold"),
    *("target_class", "target_fingerprint", "figures", "seed", "run_config", "provenance"),
)

_CARD = """---
library_name: l3d_pl
tags: [interpretability, parameter-decomposition, l3d]
---

# {n_subnetworks} subnetworks of {target_class}

A local loss landscape decomposition (L3D, arXiv 2504.00194) made with l3d_pl {version}: directions in the parameter
space of a frozen model, a sparse few of which reconstruct the gradient of each sample.

| | |
|---|---|
| target model | `{target_class}`, fingerprint `{fingerprint}` |
| tensors | {n_tensors} ({n_values:,} values) |
| subnetworks, k | {n_subnetworks}, {k} |
| divergence, reference | {divergence}, {reference} |
{figures}
## Use

```python
from l3d_pl import Decomposition

decomposition = Decomposition.from_pretrained("path/or/hub-id", target=model)
codes = decomposition.encode(inputs)  # [samples, subnetworks]
with decomposition.perturbed({{3: 0.5}}) as model:
    model(inputs)
```

| tensor | shape | rank |
|---|---|---|
{tensors}
"""


class Decomposition(ModelHubMixin, library_name="l3d_pl", tags=["interpretability", "l3d"]):
    """V_in, V_out, the batch top-k threshold for inference, and which target model they belong to.

    Args:
        subnetworks: V_in and V_out.
        target: the target model; without it only the directions themselves can be read (`attach` gives it later).
        divergence, reference, sample: as in training.
        k: the fraction kept by batch top-k.
        threshold: running mean of batch top-k's threshold.
        p_act: share of held-out samples in whose reconstruction each subnetwork took part, [n_v].
        mean_reference: mean output of the held-out data, what `encode` compares a sample with.
        figures: results worth keeping, such as the held-out loss.
        seed, run_config: of the run that found it.
    """

    def __init__(
        self,
        subnetworks: Subnetworks,
        target: nn.Module | None = None,
        divergence: DivergenceLike = "mse",
        reference: str = "random",
        sample: str = "item",
        k: float = 0.1,
        threshold: float = 0.0,
        p_act: Tensor | None = None,
        mean_reference: Tensor | None = None,
        figures: Mapping[str, Any] | None = None,
        seed: int | None = None,
        run_config: Mapping[str, Any] | None = None,
    ):
        self.subnetworks = subnetworks.requires_grad_(False)
        self.divergence, self.reference, self.sample = make_divergence(divergence), reference, sample
        self.k, self.threshold = k, threshold
        self.p_act = torch.zeros(subnetworks.n_subnetworks) if p_act is None else p_act
        self.mean_reference, self.figures, self.seed = mean_reference, dict(figures or {}), seed
        self.run_config = None if run_config is None else dict(run_config)
        self.provenance = provenance()
        self.target_fingerprint: str | None = None
        self.target_class: str | None = None
        self._target: nn.Module | None = None
        if target is not None:
            self.attach(target)

    def __repr__(self) -> str:
        names, loss = list(self.subnetworks.shapes), self.figures.get("val/loss")
        return (
            f"Decomposition({self.n_subnetworks} subnetworks of {self.target_class or 'no target yet'}, parameters "
            f"{', '.join(names[:4])}{f', ... ({len(names)} in all)' * (len(names) > 4)}, k={self.k:g}, "
            f"divergence={self.divergence.name}{'' if loss is None else f', held-out loss {loss:.4g}'})"
        )

    # -- the target model -------------------------------------------------------------------------------------------

    def attach(self, target: nn.Module) -> Decomposition:
        """Give the decomposition its target model (frozen, in eval mode).

        Raises:
            L3DError: another model than the one decomposed: other parameters, or another fingerprint.
        """
        target = freeze(target)
        shapes = {name: tuple(tensor.shape) for name, tensor in target.named_parameters()}
        for name, shape in self.subnetworks.shapes.items():
            if shapes.get(name) != shape:
                raise L3DError(
                    f"target: parameter '{name}' has shape {shapes.get(name, 'none')}, "
                    f"the decomposition is of shape {shape}"
                )
        found = fingerprint(target)
        if self.target_fingerprint not in (None, found):
            raise L3DError(
                f"target: fingerprint {found[:12]} is not that of the model decomposed, "
                f"{str(self.target_fingerprint)[:12]}"
            )
        self.target_fingerprint, self.target_class = found, f"{type(target).__module__}.{type(target).__qualname__}"
        self._target = target
        return self

    @property
    def target(self) -> nn.Module:
        """The target model.

        Raises:
            L3DError: none is attached.
        """
        if self._target is None:
            raise L3DError(
                f"target: none is attached; give the {self.target_class} to from_pretrained(..., target=model) "
                "or attach(model)"
            )
        return self._target

    def _gradients(self, inputs: Any, references: Tensor | None, generator: torch.Generator | None) -> Prepared:
        chosen = select_parameters(self.target, list(self.subnetworks.shapes))
        extractor = GradientExtractor(self.target, chosen, self.divergence, self.reference, self.sample)
        return self.subnetworks.prepare(extractor(inputs, generator, references).gradients)

    # -- reading it -------------------------------------------------------------------------------------------------

    @property
    def n_subnetworks(self) -> int:
        return self.subnetworks.n_subnetworks

    def direction(self, k: int) -> dict[str, Tensor]:
        """Subnetwork v_k, of unit norm over all its tensors: {name: [*parameter shape]}."""
        return self.subnetworks.direction(k)

    @torch.no_grad()
    def directions(self, side: str = "out") -> dict[str, Tensor]:
        """All subnetworks, dense: {name: [n_v, *parameter shape]}; side "in" gives V_in."""
        chosen = self.subnetworks.v_in if side == "in" else self.subnetworks.v_out
        return {name: tucker.dense() for name, tucker in chosen.tuckers().items()}

    def active(self, coefficients: Tensor) -> Tensor:
        """Which coefficients [N, n_v] take part: |c| at or above the running threshold, and the dense subnetworks."""
        return at_threshold(coefficients, self.threshold, self.subnetworks.n_dense)

    @torch.no_grad()
    def encode(self, inputs: Any, references: Tensor | None = None) -> Tensor:
        """Codes of samples, [N, n_v]: V_in g where it takes part (see `active`), else 0.

        A sample's code does not depend on the others of the batch. By default it is compared with the mean output of
        the held-out data: both divergences' gradients are affine in the reference (in its probabilities, for KL), so
        that the coefficient against the mean is the mean of the coefficients against all references.

        Args:
            inputs: a batch.
            references: other reference outputs, [N, ...], or one for all, [1, ...].
        """
        if references is None:
            if self.mean_reference is None:
                raise L3DError(
                    "encode: this decomposition holds no mean reference (it was never validated); give references="
                )
            references = self.mean_reference.unsqueeze(0)
        c = self.subnetworks.coefficients(self._gradients(inputs, references, None))[:, 0]
        return c * self.active(c)

    @torch.no_grad()
    def impact(self, inputs: Any, n_references: int = 8, seed: int = 0) -> Tensor:
        """I(x_i, v_k) = mean over references y_j of |V_in[k] . grad D(f(x_i), y_j)|, [N, n_v] (paper, "Impact").

        Args:
            inputs: a batch of at least 2 samples: the references are outputs of random other samples of it.
            n_references: how many references each sample is compared with.
            seed: of that choice.
        """
        if n_references < 1:
            raise L3DError(f"n_references: found {n_references}; at least 1 is needed")
        random, total = torch.Generator().manual_seed(seed), None
        for _ in range(n_references):
            c = self.subnetworks.coefficients(self._gradients(inputs, None, random))[:, 0].abs()
            total = c if total is None else total + c
        assert total is not None
        return total / n_references

    @torch.no_grad()
    def reconstruction_loss(self, inputs: Any, seed: int = 0, k: float | None = None) -> float:
        """L of a batch: references drawn as in training, batch top-k over the batch (paper, "Reconstruction loss")."""
        prepared = self._gradients(inputs, None, torch.Generator().manual_seed(seed))
        c = self.subnetworks.coefficients(prepared)
        mask, _ = batch_topk(c, self.k if k is None else k, n_dense=self.subnetworks.n_dense)
        return float(self.subnetworks.reconstruct(prepared, c * mask).loss[0])

    @contextmanager
    def perturbed(self, deltas: Mapping[int, float], parameters: Sequence[str] | None = None) -> Iterator[nn.Module]:
        """The target model at W0 + sum_k delta_k v_k for the time of a `with` block; W0 is put back to the byte.

        Args:
            deltas: {subnetwork: delta}.
            parameters: only these tensors (default: all decomposed ones).
        """
        with self.subnetworks.perturbed(self.target, deltas, parameters=parameters) as model:
            yield model

    # -- keeping it -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {
            "format_version": FORMAT_VERSION,
            "n_subnetworks": self.n_subnetworks,
            "n_dense": self.subnetworks.n_dense,
            "parameters": {
                name: {"shape": list(shape), "ranks": list(self.subnetworks.ranks[name])}
                for name, shape in self.subnetworks.shapes.items()
            },
            "divergence": self.divergence.name,
            "reference": self.reference,
            "sample": self.sample,
            "k": self.k,
            "threshold": self.threshold,
            "target_class": self.target_class,
            "target_fingerprint": self.target_fingerprint,
            "figures": {
                name: value if not isinstance(value, float) or math.isfinite(value) else None
                for name, value in self.figures.items()
            },
            "seed": self.seed,
            "run_config": self.run_config,
            "provenance": self.provenance,
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {
            name.replace("/", "."): value.detach().cpu().contiguous()
            for name, value in self.subnetworks.state_dict().items()
        }
        tensors["p_act"] = self.p_act.detach().cpu().contiguous()
        if self.mean_reference is not None:
            tensors["mean_reference"] = self.mean_reference.detach().cpu().contiguous()
        save_directory = Path(save_directory)
        _write(save_directory / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
        _write(save_directory / CONFIG, lambda path: path.write_text(json.dumps(self.config(), indent=2) + "\n"))
        _write(save_directory / "README.md", lambda path: path.write_text(self.model_card()))

    def model_card(self) -> str:
        """The model card, Markdown with the figures."""
        shapes = self.subnetworks.shapes
        figures = "".join(
            f"| {name} | {value:.4g} |\n" for name, value in self.figures.items() if isinstance(value, (int, float))
        )
        rows = "\n".join(
            f"| `{name}` | {list(shape)} | {list(self.subnetworks.ranks[name])} |" for name, shape in shapes.items()
        )
        return _CARD.format(
            n_subnetworks=self.n_subnetworks,
            target_class=self.target_class,
            fingerprint=str(self.target_fingerprint)[:12],
            n_tensors=len(shapes),
            n_values=sum(math.prod(shape) for shape in shapes.values()),
            k=self.k,
            divergence=self.divergence.name,
            reference=self.reference,
            figures=figures,
            tensors=rows,
            version=self.provenance["versions"].get("l3d_pl", ""),
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        target: nn.Module | None = None,
        divergence: DivergenceLike | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Decomposition:
        """A decomposition from a directory or from the hub. (The mixin's own reads `config.json` less carefully.)

        Args:
            pretrained_model_name_or_path: the directory, or the hub id.
            target: the target model, if it is to be attached at once.
            divergence: must be given where it is a user's own callable.
            revision, cache_dir, force_download, local_files_only, token: as everywhere for the hub.

        Raises:
            L3DError: missing or damaged files, an unknown format version, another target model.
        """
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            target=target,
            divergence=divergence,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, target: nn.Module | None = None, divergence: DivergenceLike | None = None, **hub: Any
    ) -> Decomposition:
        if not os.path.isdir(model_id):
            try:
                model_id = snapshot_download(model_id, **hub)
            except Exception as error:
                raise L3DError(
                    f"decomposition: '{model_id}' is no directory, and not to be had from the hub "
                    f"({type(error).__name__})"
                ) from error
        folder = Path(model_id)
        config = _read_config(folder / CONFIG)
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise L3DError(f"decomposition: {folder / WEIGHTS} cannot be read ({error})") from error
        shapes = {name: tuple(entry["shape"]) for name, entry in config["parameters"].items()}
        ranks = {name: list(entry["ranks"]) for name, entry in config["parameters"].items()}
        n_dense = config.get("n_dense", 0)  # (earlier versions had none)
        with torch.device("meta"):  # the file's tensors take their place, which are read when they are used
            subnetworks = Subnetworks(shapes, config["n_subnetworks"], ranks, n_dense=n_dense)
        state = subnetworks.state_dict()
        for name, value in state.items():
            stored = tensors.get(name.replace("/", "."))
            if stored is None or stored.shape != value.shape:
                found = "nothing" if stored is None else tuple(stored.shape)
                raise L3DError(
                    f"decomposition: tensor '{name.replace('/', '.')}' in {folder / WEIGHTS}: found {found}, "
                    f"expected {tuple(value.shape)}"
                )
            state[name] = stored
        subnetworks.load_state_dict(state, assign=True)
        given = config["divergence"] if divergence is None else divergence
        result = cls(
            subnetworks,
            divergence=given,
            reference=config["reference"],
            sample=config["sample"],
            k=config["k"],
            threshold=config["threshold"],
            p_act=tensors.get("p_act"),
            mean_reference=tensors.get("mean_reference"),
            figures=config["figures"],
            seed=config["seed"],
            run_config=config["run_config"],
        )
        result.target_fingerprint, result.target_class = config["target_fingerprint"], config["target_class"]
        result.provenance = config["provenance"]
        return result if target is None else result.attach(target)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise L3DError(f"decomposition: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise L3DError(f"decomposition: {path} cannot be read ({error})") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise L3DError(
            f"decomposition: {path} has format version {version}; this l3d_pl reads version {FORMAT_VERSION}"
        )
    for key in CONFIG_KEYS:
        if key not in config:
            raise L3DError(f"decomposition: {path} has no entry '{key}'")
    return config


def _write(path: Path, write: Any) -> None:
    """Write beside the file and rename: a reader never meets half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
