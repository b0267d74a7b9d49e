"What a package shows: the public names of its modules, for its `__init__`"
from importlib import import_module

def show_rooms(package, *rooms):
    "Bring all that the modules `rooms` of kdnb export into the namespace `package`; their names, for `__all__`"
    modules = [import_module(f'kdnb.{o}') for o in rooms]
    package.update({k: getattr(m, k) for m in modules for k in m.__all__})
    return [k for m in modules for k in m.__all__]
