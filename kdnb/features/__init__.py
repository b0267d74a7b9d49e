"Logits and activations of a network: found, captured, paired, stored"
from importlib import import_module
from ..core import described,evaluating,get_layer,inputs,unwrap

__all__ = []
for _room in ('logits','capture','layers','halves','stored'):
    _room = import_module(f'kdnb.features.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
