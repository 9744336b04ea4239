import sys

from sglang_spherical.cli import main

sys.exit(main())
