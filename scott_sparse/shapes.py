"""Shape annotations such as `Float[Tensor, "B N D"]`.

With jaxtyping installed (the tests) they are checked on every call; without it (a plain `pip install`) they are
documentation only, so that the package needs nothing beyond torch.
"""

from torch import Tensor

try:
    from jaxtyping import Bool, Float, Int, UInt8
except ModuleNotFoundError:

    class _Inert:
        """Stands in for a jaxtyping dtype: `Float[Tensor, "B N"]` is then plain `Tensor`."""

        def __class_getitem__(cls, item):
            return item[0]

    Bool = Float = Int = UInt8 = _Inert

__all__ = ["Bool", "Float", "Int", "Tensor", "UInt8"]
