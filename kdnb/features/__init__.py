"Logits and activations of a network: found, captured, paired, stored"
from kdnb._face import show_rooms
from ..core import described,evaluating,get_layer,inputs,unwrap

__all__ = show_rooms(globals(), *(f'features.{o}' for o in 'logits capture layers halves stored'.split()))
