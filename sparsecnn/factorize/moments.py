"""What a layer does on data: moments of its inputs and responses, and a sample of both.

For each conv group, at randomly chosen output positions of the calibration images,

    Z (G, n, D)      input patches, D = S kh kw, in the order of ``weight.reshape(T, -1)``,
    Y (G, n, T)      responses of the original network, bias included and before any activation,
    Y_hat (G, n, T)  responses of the same weights to Z, where Z comes from a network whose earlier
                     layers are compressed: what the asymmetric reconstruction regresses on.

Second moments stream over all positions; of the rows themselves at most a number stays, each
position seen with the same chance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 10_000
POSITIONS = 10


class Moments:
    """Streaming statistics of one layer, by conv group.

    Args:
        limit: rows that are kept.
        seed: of the choice which.

    Raises:
        ValueError: limit below 1.

    Memory: G D^2 + G T^2 numbers of 8 bytes, and up to 2 `limit` rows in the dtype they came in.
    """

    def __init__(self, *, limit: int = LIMIT, seed: int = 0) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"Moments: expected limit an integer >= 1, got {limit!r}")
        self.limit = limit
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs = torch.zeros(0)
        self._means = torch.zeros(0)
        self._scatter = torch.zeros(0)
        # Lists that grow; "key" is uniform, and the rows of the least keys stay.
        self._rows: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, patches: Tensor | None, y: Tensor, y_hat: Tensor | None = None) -> None:
        """Take in some positions.

        Args:
            patches: Z (m, G, D); None to do without moments and samples of the inputs, which are
                the larger part.
            y: (m, G, T).
            y_hat: (m, G, T).

        Raises:
            ValueError: shapes that do not fit each other or the earlier ones, parts that the
                earlier updates did not have, or values that are not finite.
        """
        rows = {"y": y}
        if patches is not None:
            rows["z"] = patches
        if y_hat is not None:
            rows["y_hat"] = y_hat
        rows = {name: value.detach().cpu() for name, value in rows.items()}
        self._check(rows)
        count = len(y)
        if count == 0:
            return
        if not self._rows:
            self._rows = {name: [] for name in ("key", *rows)}
            groups, width = y.shape[1:]
            self._means = torch.zeros(groups, width, dtype=torch.float64)
            self._scatter = torch.zeros(groups, width, width, dtype=torch.float64)
            if patches is not None:
                size = patches.shape[2]
                self._inputs = torch.zeros(groups, size, size, dtype=torch.float64)
        wide = rows["y"].double().transpose(0, 1)
        mean = wide.mean(1)
        centred = wide - mean[:, None]
        # Chan, Golub, LeVeque 1979: sums of squares about the running mean. The difference of raw
        # moments would lose the variance of responses with a large mean.
        shift = mean - self._means
        share = count / (self.count + count)
        self._scatter += centred.mT @ centred
        self._scatter += self.count * share * shift[:, :, None] * shift[:, None, :]
        self._means += share * shift
        self.count += count
        if "z" in rows:
            flat = rows["z"].double().transpose(0, 1)
            self._inputs += flat.mT @ flat
        self._rows["key"].append(
            torch.rand(count, generator=self._generator, dtype=torch.float64)
        )
        for name, value in rows.items():
            self._rows[name].append(value)
        if sum(len(keys) for keys in self._rows["key"]) > 2 * self.limit:
            self._compact()

    def _check(self, rows: dict[str, Tensor]) -> None:
        shapes = {name: tuple(value.shape) for name, value in rows.items()}
        if any(len(shape) != 3 for shape in shapes.values()):
            raise ValueError(f"Moments: expected rows (m, groups, width), got {shapes}")
        y = shapes["y"]
        if any(shape[:2] != y[:2] for shape in shapes.values()) or shapes.get("y_hat", y) != y:
            raise ValueError(f"Moments: expected rows of equal length and groups, got {shapes}")
        if self._rows:
            kept = {name: value[0].shape[1:] for name, value in self._rows.items() if name != "key"}
            given = {name: value.shape[1:] for name, value in rows.items()}
            if kept != given:
                raise ValueError(
                    "Moments: expected the parts and widths of the first update, "
                    f"{ {k: tuple(v) for k, v in kept.items()} }, got {shapes}"
                )
        for name, value in rows.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"Moments: expected finite rows, got NaN or infinity in {name}"
                )

    def _compact(self) -> None:
        if not self._rows:
            raise ValueError("Moments: expected at least one update, got none")
        joined = {name: torch.cat(chunks) for name, chunks in self._rows.items()}
        if len(joined["key"]) > self.limit:
            chosen = joined["key"].topk(self.limit, largest=False).indices.sort().values
            joined = {name: value[chosen] for name, value in joined.items()}
        self._rows = {name: [value] for name, value in joined.items()}

    def _part(self, name: str) -> Tensor:
        self._compact()
        if name not in self._rows:
            raise ValueError("Moments: expected updates with patches, got responses only")
        return self._rows[name][0].transpose(0, 1).double()

    @property
    def groups(self) -> int:
        """Conv groups; 0 before the first update."""
        return len(self._means)

    @property
    def asymmetric(self) -> bool:
        """Whether there is a Y_hat beside Y."""
        return "y_hat" in self._rows

    def cov_in(self) -> Tensor:
        """E z z' (G, D, D): the second moment of the patches, not centred.

        Raises:
            ValueError: no patches were given.
        """
        if not self._inputs.numel():
            raise ValueError("Moments: expected updates with patches, got responses only")
        return self._inputs / self.count

    def cov_out(self) -> Tensor:
        """E (y - mean) (y - mean)' (G, T, T).

        Raises:
            ValueError: no update yet.
        """
        if not self.count:
            raise ValueError("Moments: expected at least one update, got none")
        return self._scatter / self.count

    def mean_out(self) -> Tensor:
        """E y (G, T).

        Raises:
            ValueError: no update yet.
        """
        if not self.count:
            raise ValueError("Moments: expected at least one update, got none")
        return self._means.clone()

    def samples(self) -> tuple[Tensor, Tensor]:
        """Z (G, n, D) and Y (G, n, T), n at most `limit`.

        Raises:
            ValueError: no patches were given.
        """
        return self._part("z"), self._part("y")

    def responses(self) -> tuple[Tensor, Tensor]:
        """Y and Y_hat (G, n, T), the latter Y itself if there is none.

        Raises:
            ValueError: no update yet.
        """
        y = self._part("y")
        return y, self._part("y_hat") if self.asymmetric else y


def positions_of(layer: nn.Module, output: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Output positions drawn without replacement, `count` per image or all if there are fewer.

    Returns:
        Ascending indices (m,) into the rows of `responses_at`, on the CPU.
    """
    images = 1 if output.dim() < 2 else len(output)
    total = output.numel() // _width(layer)
    per_image = total // max(images, 1)
    keys = torch.rand(images, per_image, generator=source)
    chosen = keys.topk(min(count, per_image), dim=1).indices.sort(1).values
    return (chosen + torch.arange(images)[:, None] * per_image).flatten()


def responses_at(layer: nn.Module, output: Tensor, positions: Tensor) -> Tensor:
    """Y (m, G, T): the outputs at some positions."""
    rows = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    found = rows.reshape(-1, _width(layer))[positions.to(output.device)]
    return found.reshape(len(found), groups, -1)


def patches_at(layer: nn.Module, x: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """Z (m, G, D): what the outputs at some positions depend on.

    Gathered from the input padded as the layer pads it, 'same' and the other modes included; all
    patches at once would hold kh kw times the input.
    """
    positions = positions.to(x.device)
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])[positions][:, None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    height, width = output.shape[2:]
    image = positions // (height * width)
    corner = (positions // width % height, positions % width)
    lines = []
    for axis in (0, 1):
        taps = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis]
        lines.append(corner[axis][:, None] * layer.stride[axis] + taps)
    found = padded[image[:, None, None], :, lines[0][:, :, None], lines[1][:, None, :]]
    # (m, kh, kw, C) to (m, G, S kh kw)
    return found.permute(0, 3, 1, 2).reshape(len(positions), layer.groups, -1)


def _width(layer: nn.Module) -> int:
    width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    assert isinstance(width, int)
    return width
