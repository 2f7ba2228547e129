"""Drop-in modules for applications that import `core.*`; other `core` folders on the path are joined with this one."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
