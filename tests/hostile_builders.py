"""Hands every builder hostile arguments, under an audit hook. Run by test_bundle_hostile.py in a process of its own."""

import contextlib
import inspect
import os
import random
import sys
import warnings

from torchfolio.bundle import BundleError, build, builders, resolve

mark = sys.argv[1]
code = f"__import__('os').system('touch {mark}')"
net = {"build": "torchfolio.models:ConvNet", "arguments": {"widths": [3, 4]}}
values = [
    code,
    "/etc/passwd",
    "../../x",
    "%999999999d",
    "a" * 10**6,
    "",
    "os:system",
    0,
    -1,
    1,
    3,
    10**9,
    2**31 - 1,
    2**62,
    10**400,
    True,
    None,
    0.5,
    -1.0,
    1e300,
    [],
    [0],
    [-1],
    [code],
    [[0]],
    [[3], [3]],
    [2, 4, 8],
    [10**9] * 3,
    [1] * 10**5,
    [[]] * 10**5,
    {},
    {"a": 1},
    net,
    {"build": "os:system", "arguments": {"command": "touch " + mark}},
    {"build": "torchfolio.models:ViT", "arguments": {"depth": 10**9}},
    {"build": code, "arguments": {}},
]
NEEDED = {
    "in_features": 4,
    "out_features": 3,
    "in_channels": 3,
    "out_channels": 4,
    "dim": 8,
    "heads": 2,
    "vocab_src": 5,
    "vocab_tgt": 5,
    "model": net,
    "shape": [1, 8, 8],
    "in_ch": 1,
    "num_classes": 3,
}
WATCHED = ("os", "subprocess", "socket", "shutil", "ctypes", "urllib", "pickle")


def arguments_of(path):
    """What a builder takes, and what it cannot be built without."""
    signature = inspect.signature(resolve(path), eval_str=True)
    parameters = dict(signature.parameters)
    if "kwargs" in parameters:
        parameters |= inspect.signature(signature.return_annotation).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    needed = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    return names, {name: NEEDED[name] for name in needed if name in NEEDED}


def jobs():
    chooser = random.Random(0)
    for path in sorted(builders()):
        names, needed = arguments_of(path)
        for name in names:
            for value in chooser.sample(values, 10):
                yield path, {**needed, name: value}
        for _ in range(4):
            yield path, {name: chooser.choice(values) for name in names}
        yield from ((path, {key: 1}) for key in (code, "__class__", "kwargs", "self"))


todo, seen, watching = list(jobs()), [], False


def hook(event, args):
    own = event == "exec" and getattr(args[0], "co_filename", "").startswith(sys.prefix)  # torch imports parts late
    if watching and not own and (event in ("compile", "exec", "open", "import") or event.split(".")[0] in WATCHED):
        seen.append((event, str(args[0])[:200] if args else ""))


def attempt(path, arguments):
    try:
        build(path, arguments, limit=10**6)
    except BundleError:
        return "refused"
    return "built"


warnings.simplefilter("ignore")
for path in sorted(builders()):  # what is imported at the first use
    with contextlib.suppress(BundleError):
        build(path, arguments_of(path)[1], limit=10**6)
sys.addaudithook(hook)
watching = True
outcomes = [attempt(path, arguments) for path, arguments in todo]
watching = False
print({outcome: outcomes.count(outcome) for outcome in set(outcomes)}, seen[:10])
sys.exit(bool(seen) or os.path.exists(mark))
