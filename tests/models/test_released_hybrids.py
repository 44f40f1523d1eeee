import pytest
from checks import released

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_released_format_computes_the_formulas(kind):
    released.check_released(kind)
