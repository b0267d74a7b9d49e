"What a training step costs: ratios in one process, one thread, the variants in turn, processor time. Prints the machine's load."
import os, warnings

warnings.filterwarnings('ignore', category=FutureWarning)
from kdnb.all import *

def stepper(model, cbs=(), teacher=None, opt_func=Adam, shape=(1,28,28), bs=256):
    "A function that does one training step of a fastai Learner; with `teacher`, also its bare forward pass"
    dls = from_arrays(torch.randint(0, 256, (8*bs,*shape), dtype=torch.uint8), torch.arange(8*bs)%10, bs=bs, device='cpu')
    learn = Learner(dls, model, opt_func=opt_func, cbs=cbs)
    learn.remove_cbs([ProgressCallback, Recorder])
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-3)
    learn.n_epoch,learn.n_iter,learn.dl,learn.epoch,learn.logger = 1000,8,dls.train,0,noop
    learn.recorder = None
    for event in ('before_fit','before_epoch','before_train'): learn(event)
    learn.pct_train,batches = .5,list(dls.train)
    def step(i=[0]):
        i[0] += 1
        if teacher is not None:
            with torch.no_grad(): teacher(batches[i[0]%8][0].as_subclass(Tensor))
        learn.one_batch(0, batches[i[0]%8])
    return step

def main(rounds=101):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)   # Adam's averages of vanishing gradients are slow, on either side of a ratio
    print(f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}; medians of {rounds} steps, batch 256')
    teacher = lenet5().eval()
    steps = {'plain': stepper(lenet300()),
             'plain + teacher forward': stepper(lenet300(), teacher=teacher),
             'KnowledgeDistillation': stepper(lenet300(), KnowledgeDistillation(teacher)),
             "variational 'group'": stepper(to_variational(lenet300()), VariationalSparsifier()),
             'plain, fused': stepper(lenet300(), opt_func=fused_adam),
             "variational 'group', fused": stepper(to_variational(lenet300()), VariationalSparsifier(), opt_func=fused_adam),
             "variational 'full'": stepper(to_variational(lenet300(), noise='full'), VariationalSparsifier()),
             'plain, batch 1024': stepper(lenet300(), bs=1024),
             "variational 'group', batch 1024": stepper(to_variational(lenet300()), VariationalSparsifier(), bs=1024)}
    ms = dict(zip(steps, median_ms(list(steps.values()), rounds)))
    for name,base,goal in [('KnowledgeDistillation','plain + teacher forward','1.10'), ("variational 'group'",'plain','1.25'),
                           ("variational 'group', fused",'plain, fused',''), ("variational 'group', batch 1024",'plain, batch 1024',''), ("variational 'full'",'plain','')]:
        print(f'{name:31} {ms[name]:6.2f} ms = {ms[name]/ms[base]:.2f} × {base} ({ms[base]:.2f} ms)' + (f', at most {goal} wanted' if goal else ''))

if __name__=='__main__': main()
