"""Other people's implementations, for the tests that compare with them; skipped where they are not installed."""

import warnings

import pytest

# PyPI's torchvision beside a CPU build of PyTorch lacks its compiled operators and refuses to be imported without
# their names. No test calls one.
_OPERATORS = (
    "nms qnms roi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward "
    "ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
)
_kept = []


def import_timm():
    """timm, or a skip."""
    return _import_beside_torch("timm")


def import_transformers():
    """transformers, or a skip."""
    return _import_beside_torch("transformers")


def _import_beside_torch(name):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except ImportError:
            pass
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS.split():
                library.define(f"{operator}() -> ()")
            _kept.append(library)  # operators vanish with it
        return pytest.importorskip(name)
