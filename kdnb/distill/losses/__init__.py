"Distillation losses: pure functions of tensors, of student and teacher in, a scalar out"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), 'distill.losses.shared', 'distill.losses.logits', 'distill.losses.features')
