"Old module paths: still importable in this version, with a warning that says where things are now"
import importlib,sys,warnings
from importlib.abc import Loader,MetaPathFinder
from importlib.machinery import ModuleSpec,PathFinder
from itertools import chain

MOVED = {'terms': 'training.terms training.params training.optimizer training.callbacks training.schedules core',
         'checkpoint': 'training.checkpoint training.state training.memory training.fingerprint files locks',
         'processes': 'training.processes',
         'trace': 'channels.trace channels.arithmetic channels.operations channels.sizes channels.labels layers',
         'prune.masks': 'masks layers',
         'recipes.core': 'recipes.run recipes.training recipes.stage recipes.folder recipes.settings recipes.registry '
                         'recipes.record training.schedules files locks',
         'distill.methods': ' '.join(f'distill.{o}' for o in
                                     'terms logits layers heads vid crd srrl semckd simkd names'.split()),
         'deploy': 'export.onnx export.speed export.session export.quantize export.graph'}

# modules that are there, and others that hold now some of what stood in them
SPLIT = {'files': 'locks', 'data.arrays': 'data.loaders',
         'channels.trace': 'channels.labels channels.sizes channels.operations channels.arithmetic',
         'channels.trial': 'channels.remove',
         'training.state': 'training.memory',
         'variational.layers': 'variational.gates variational.kl',
         'variational.convert': 'variational.threshold',
         'variational.callback': 'variational.show variational.layers variational.threshold training.schedules',
         'prune.criteria': 'prune.scoring prune.lowest prune.select prune.penalties',
         'prune.callback': 'prune.lowest prune.select prune.rewind training.schedules training.callbacks',
         'prune.select': 'prune.lowest',
         'distill.callback': 'distill.learner distill.show distill.seen',
         'distill.task': 'distill.adapter distill.inputs', 'distill.adapter': 'distill.inputs core',
         'recipes.prune_then_distill': 'recipes.prune_then_distill_tables', 'recipes.prue': 'recipes.prue_tables',
         'recipes.sequential': 'recipes.sequential_tables', 'recipes.vid': 'recipes.vid_jobs recipes.vid_tables'}

def _finds(module, places, warn=False):
    "Let `module` look for what it lacks in the modules `places`"
    def find(name):
        for o in map(importlib.import_module, places) if not name.startswith('__') else ():
            if not hasattr(o, name): continue
            if warn: warnings.warn(f'{name} of {module.__name__} is in {o.__name__} now; '
                                   'the old place goes with the next version.', FutureWarning, stacklevel=2)
            return getattr(o, name)
        raise AttributeError(f'module {module.__name__} has no attribute {name}')
    module.__getattr__ = find

class MovedFinder(MetaPathFinder, Loader):
    "Makes a module of an old name that looks in the modules which hold its things now"
    def find_spec(self, name, path=None, target=None):
        if name.startswith('kdnb.') and name[5:] in MOVED: return ModuleSpec(name, self)

    def exec_module(self, module):
        places = [f'kdnb.{o}' for o in MOVED[module.__name__[5:]].split()]
        warnings.warn(f'{module.__name__} is {" and ".join(places)} now; the old name goes with the next version.',
                      FutureWarning, stacklevel=2)
        module.__all__ = [*chain.from_iterable(m.__all__ for m in map(importlib.import_module, places))]
        _finds(module, places)

class SplitFinder(MetaPathFinder):
    "Gives a module of which parts have moved a look at the modules that hold them now"
    def find_spec(self, name, path=None, target=None):
        if not name.startswith('kdnb.') or name[5:] not in SPLIT: return
        if (spec := PathFinder.find_spec(name, path, target)) is None: return
        run = spec.loader.exec_module
        def exec_module(module):
            _finds(module, [f'kdnb.{o}' for o in SPLIT[name[5:]].split()], warn=True)
            run(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, MovedFinder())
sys.meta_path.insert(0, SplitFinder())
