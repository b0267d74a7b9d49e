"The papers' networks by name"
from importlib import import_module

__all__ = []
for _room in ('registry','lenets','resnets','vggs','torchvision','named'):
    _room = import_module(f'kdnb.models.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
