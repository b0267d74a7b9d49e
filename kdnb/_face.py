"What a package shows: the public names of its modules, for its `__init__`"
from importlib import import_module
from itertools import chain

def show_rooms(package, *rooms):
    "Bring all that the modules `rooms` of kdnb export into the namespace `package`; their names, for `__all__`"
    modules = [import_module(f'kdnb.{o}') for o in rooms]
    for m in modules: package.update({k: getattr(m, k) for k in m.__all__})
    return [*chain.from_iterable(m.__all__ for m in modules)]
