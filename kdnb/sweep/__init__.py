"Every combination of a grid once, on as many processes and machines as there are"
from importlib import import_module

__all__ = []
for _room in ('grid','storage','processes','worker','result'):
    _room = import_module(f'kdnb.sweep.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
