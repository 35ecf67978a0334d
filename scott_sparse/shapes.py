"""Shape annotations such as `Float[Tensor, "B N D"]`.

With jaxtyping installed, as for the tests, they are checked on every call. Without it they are documentation only, so
that the package needs nothing beyond torch.
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # a type checker reads them as plain `Tensor`
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ModuleNotFoundError:

        class _Inert:
            """Stands in for a jaxtyping dtype: `Float[Tensor, "B N"]` is then plain `Tensor`."""

            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = UInt8 = _Inert

__all__ = ["Bool", "Float", "Int", "Tensor", "UInt8"]
