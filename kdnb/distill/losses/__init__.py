"Distillation losses: pure functions of tensors, of student and teacher in, a scalar out"
from importlib import import_module

__all__ = []
for _room in ('shared','logits','features'):
    _room = import_module(f'kdnb.distill.losses.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
