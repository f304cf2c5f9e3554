"""``python -m mxnorm_pass``."""

from mxnorm_pass.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
