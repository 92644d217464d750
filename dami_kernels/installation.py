"""What to install for the parts that need more than the package itself.

The commands work even if this package is on no package index.
"""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, requires

AGAIN = "this package again as before, with pip's --no-cache-dir --force-reinstall --no-deps"


def needs(what: str, module: str, extra: str | None = None) -> str:
    """Returns the text "WHAT needs MODULE: pip install …".

    Args:
        what: the part that cannot run.
        module: the name that could not be imported.
        extra: an extra of pyproject.toml, whose packages the command installs. If None, it installs the module's.
    """
    # Imported here, because this package is also published as Hugging Face hub kernels, which may import torch only.
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        known = [Requirement(line) for line in requires("dami-kernels") or ()]
    except PackageNotFoundError:  # a checkout in PYTHONPATH
        known = []
    if extra is None:
        wanted = [one for one in known if canonicalize_name(one.name) == canonicalize_name(module)]
    else:
        wanted = [one for one in known if one.marker is not None and one.marker.evaluate({"extra": extra})]
    for one in wanted:
        one.marker = None
    packages = dict.fromkeys(map(str, wanted)) or [module]
    return f"{what} needs {module}: pip install {shlex.join(packages)}"
