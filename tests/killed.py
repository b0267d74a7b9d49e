"A run that is killed again and again, each time in a stage. Children are forked, so that nothing is imported twice"
import os, random, signal, time

import kdnb.recipes.run as run_module
from kdnb.all import *

KILLS,STAGES = 3,('teacher','student','sparse','small','thin','finish')

def work(path, pipe=None):
    "The whole run; says on `pipe` which stage begins"
    run_module.latency = lambda models, data: [1.]*len(models)     # times are never equal
    Checkpoint.share = .5
    def says(name, f):
        def g(self, *args, **kwargs):
            stage = 'finish' if name=='finish' else args[2] if name=='_train' else args[0]
            if pipe is not None: os.write(pipe, f'{stage}\n'.encode())
            return f(self, *args, **kwargs)
        setattr(Run, name, g)
    for name in ('_train','enter','finish'): says(name, getattr(Run, name))
    dls = image_dls('digits', bs=256, pad=1)
    vbgs_kd(dls, 'lenet5_caffe', 'lenet300', path, (6,6,12), data='digits', gamma_weight=20., cooldown=(.4,.8), single_weights=20., show=False).report()

def attempt(path, stage, delay):
    "Run until `stage` or a later one has begun and `delay` seconds have passed, then kill; True if it was in that stage"
    out,inp = os.pipe()
    if (pid := os.fork())==0:
        try: work(path, inp); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    os.close(inp)
    said = b''
    wanted = {o.encode() for o in STAGES[STAGES.index(stage):]} if stage else set()
    while not wanted & {*said.split(b'\n')} and (more := os.read(out, 1000)): said += more
    time.sleep(delay)
    if stage: os.kill(pid, signal.SIGKILL)
    os.close(out)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status)==0, 'the run failed'
    return os.WIFSIGNALED(status) and stage.encode() in said

def kills(folder, seed):
    "Make a run in `folder/whole` and one that is killed in `folder/killed`; how often in which stage"
    rng,start,res = random.Random(seed),time.perf_counter(),{}
    work(folder/'whole')       # here: what it imports is there in every fork
    whole = time.perf_counter()-start
    for stage in STAGES:
        for _ in range(KILLS):
            if attempt(folder/'killed', stage, rng.uniform(0, whole/40)): res[stage] = res.get(stage, 0)+1
    attempt(folder/'killed', None, 0)
    return res
