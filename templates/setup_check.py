import importlib
import sys

sys.path[:0] = sys.argv[1:]
failed = list(missing(RECIPES, gpu=GPU))
for what in failed:
    print(f"ftgen: error: {what}", flush=True)
for name in STACK:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        failed.append(name)
        print(f"ftgen: error: {name} cannot be imported: {type(error).__name__}: {error}", flush=True)
    else:
        place = next(iter(getattr(module, "__path__", [])), getattr(module, "__file__", ""))
        print(f"ftgen: {name} {getattr(module, '__version__', '?')} in {place}", flush=True)
if failed:
    print(f"  hint: {HINT}", flush=True)
    sys.exit(1)
