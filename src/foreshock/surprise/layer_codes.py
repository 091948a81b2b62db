"""The codes of one layer, and how far from them its outputs lie."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from foreshock.ops import SoftAssigner
from foreshock.surprise.derived import Derived
from foreshock.surprise.float32_buffers import Float32Buffers

# Squared distances are in units of the variance within clusters, where the probabilities of
# Gaussian clusters are softmax(-d2 / 2).
_TEMPERATURE = 2.0


BUFFERS = ("mean", "projection", "centers")


class LayerCodes(Float32Buffers):
    """Squared distance of a layer's outputs to the nearest code, in the whitened space.

    z = (x - mean) @ projection, D = min_k |z - c_k|^2, and L and H of the same `soft_assign`.

    All it holds are buffers, which move with `.to()` and stay float32, and no parameter.

    Args:
        layer: dotted name in the model.
        name: of these outputs: the layer's, with the number of the call where there are several.
        mean: (D,) of the outputs.
        projection: (D, E) to the whitened space.
        centers: (K, E) codes.
    """

    mean: Tensor
    projection: Tensor
    centers: Tensor

    def __init__(
        self,
        layer: str,
        name: str,
        mean: Tensor,
        projection: Tensor,
        centers: Tensor,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.name = name
        tensors = (mean, projection, centers)
        for buffer, tensor in zip(BUFFERS, tensors, strict=True):
            self.register_buffer(buffer, tensor.float().contiguous())
        self._assigner = Derived(_bind)

    def measure(self, rows: Tensor, has_codes: bool) -> tuple[Tensor, ...]:
        """D of rows, or D, L and H.

        Args:
            rows: (N, D), or (N, P, D) of a layer with positions; no gradient goes through.
            has_codes: whether L and H are wanted.
        Returns:
            One or three tensors, (N,) or (N, P).
        Raises:
            ValueError: naming the layer, what it gave and what is accepted.
        Cost:
            One call of `SoftAssigner`, which is bound anew when a buffer has changed.
        """
        try:
            assigner = self._bound()
            if not has_codes:
                return (assigner.distance(rows),)
            code = assigner(rows)
        except ValueError as error:
            raise ValueError(
                f"layer {self.name!r} gives {rows.shape[-1]} features on {rows.device}; accepted: "
                f"{len(self.mean)} on {self.mean.device}, as fitted; probe.to(device) moves the "
                "probe"
            ) from error
        return code.distance, code.length, code.entropy

    def writer(self, out: Tensor) -> Callable[[object], bool] | None:
        """`SoftAssigner.writer` of D, with the buffers as they are now.

        Args:
            out: (N,) or (N, P), float32.
        """
        return self._bound().writer(out) if out.device == self.mean.device else None

    def _bound(self) -> SoftAssigner:
        # Of the dictionary itself: nn.Module looks in two others before.
        buffers = self._buffers
        return self._assigner.of(buffers["mean"], buffers["projection"], buffers["centers"])

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by the names that the constructor has for them."""
        return {name: getattr(self, name) for name in BUFFERS}


def _bind(mean: Tensor, projection: Tensor, centers: Tensor) -> SoftAssigner:
    return SoftAssigner(centers, temperature=_TEMPERATURE, offset=mean, basis=projection)
