"Old module paths: still importable in this version, with a warning that says where things are now"
import importlib,sys,warnings
from importlib.abc import Loader,MetaPathFinder
from importlib.machinery import ModuleSpec

MOVED = {'terms': 'training.terms training.params training.optimizer training.callbacks training.schedules core',
         'checkpoint': 'training.checkpoint training.state training.fingerprint files',
         'processes': 'training.processes', 'trace': 'channels.trace layers', 'prune.masks': 'masks layers'}

class MovedFinder(MetaPathFinder, Loader):
    "Makes a module of an old name that looks in the modules which hold its things now"
    def find_spec(self, name, path=None, target=None):
        if name.startswith('kdnb.') and name[5:] in MOVED: return ModuleSpec(name, self)

    def exec_module(self, module):
        places = [f'kdnb.{o}' for o in MOVED[module.__name__[5:]].split()]
        warnings.warn(f'{module.__name__} is {" and ".join(places)} now; the old name goes with the next version.',
                      FutureWarning, stacklevel=2)
        rooms = [importlib.import_module(o) for o in places]
        module.__all__ = [o for m in rooms for o in m.__all__]
        def find(name):
            for m in rooms:
                if hasattr(m, name): return getattr(m, name)
            raise AttributeError(f'module {module.__name__} has no attribute {name}')
        module.__getattr__ = find

sys.meta_path.append(MovedFinder())
