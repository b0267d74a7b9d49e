"Masks that hold, and what they are put on"
from importlib import import_module

__all__ = []
for _room in ('layers','model','files'):
    _room = import_module(f'kdnb.masks.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
