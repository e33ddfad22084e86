"""Everything that knows Ray: renderers, their pool, the driver, the command line.  No FastAPI.

Ray reads one switch while it is imported, so it is set here, before any module of this package imports Ray:
a Ray that this program starts for itself listens on loopback only.
"""

import os

if os.environ.get("INFINITETALK_RAY_ADDRESS", "local") == "local":
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
