"Old module paths: still importable in this version, with a warning that says where things are now"
import importlib,sys,warnings
from importlib.abc import Loader,MetaPathFinder
from importlib.machinery import ModuleSpec

MOVED = {'terms': 'training.terms training.callbacks training.schedules core', 'checkpoint': 'training.checkpoint training.fingerprint files',
         'processes': 'training.processes', 'trace': 'channels.trace layers', 'prune.masks': 'masks layers',
         'distill.methods': ' '.join(f'distill.{o}' for o in 'terms logits layers heads vid crd srrl semckd simkd names'.split())}

def looks_in(module, *rooms):
    "`__getattr__` of the module of that name for what stands in `rooms` now"
    def find(name):
        for o in () if name.startswith('__') else rooms:
            if hasattr(room := importlib.import_module(o), name): return getattr(room, name)
        raise AttributeError(f'module {module} has no attribute {name}')
    return find

class MovedFinder(MetaPathFinder, Loader):
    "Makes a module of an old name that looks in the modules which hold its things now"
    def find_spec(self, name, path=None, target=None):
        if name.startswith('kdnb.') and name[5:] in MOVED: return ModuleSpec(name, self)

    def exec_module(self, module):
        places = [f'kdnb.{o}' for o in MOVED[module.__name__[5:]].split()]
        warnings.warn(f'{module.__name__} is {" and ".join(places)} now; the old name goes with the next version.',
                      FutureWarning, stacklevel=2)
        module.__all__ = [o for m in places for o in importlib.import_module(m).__all__]
        module.__getattr__ = looks_in(module.__name__, *places)

sys.meta_path.append(MovedFinder())
