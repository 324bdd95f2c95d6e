"""What a command says to --help."""

import inspect
import sys
from types import ModuleType

from absl import flags


def help_text(command: ModuleType) -> str:
    """What the command does and the flags that it takes, without those of libraries."""
    own = {"config"} | {
        flag.name
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        for flag in defined
        if module in ("__main__", command.__name__, sys.argv[0])
    }
    lines = [inspect.cleandoc(command.__doc__ or ""), "", "Flags:"]
    for name in sorted(own & set(flags.FLAGS)):
        flag = flags.FLAGS[name]
        default = f" (default: {flag.default})" if flag.default not in (None, "") else ""
        lines.append(f"  --{name}: {flag.help}{default}")
    if "config" in flags.FLAGS:
        lines.append("  --config.KEY=VALUE: any key of the config; docs/config.md lists them")
    return "\n".join(lines)
