"Grids that were run, the rows that came out, and what they say about a claim"
from importlib import import_module

__all__ = []
for _room in ('rows','work','tables'):
    _room = import_module(f'kdnb.evidence.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
