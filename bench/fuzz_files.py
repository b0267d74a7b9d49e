"""3,000 mutated model files, fixed seed: every one ends in a ValueError or a network; the slowest, the largest, and whether anything
was executed or written."""
import random, resource, sys, tempfile, time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
import torch
from kdnb.all import *
from test_export import mutated, packed

torch.set_num_threads(1)
events = []
def audit(event, args):
    "What a loader must not do: run code, start something, open a file for writing"
    if not watching: return
    if event in ('exec','compile','subprocess.Popen','os.system','os.remove','os.rename','os.mkdir','socket.connect','pickle.find_class','import'): events.append(event)
    if event=='open' and isinstance(args[1], str) and set(args[1]) & set('wax+'): events.append(f'open {args[0]}')

watching = False
sys.addaudithook(audit)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024     # MB

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    model = lenet5(in_shape=(1,12,12))
    with torch.no_grad(): model.fc1.weight[:,:18] = 0; model.fc2.weight[:,:20] = 0
    small = shrink(model, torch.randn(2,1,12,12)).eval()
    goods = [packed(small, folder, z).read_bytes() for z in (0,.9)]
    f,rng,ended,times,grown = folder/'bad.safetensors',random.Random(0),Counter(),[],[]
    for g in goods: f.write_bytes(g); load_model(f)      # warm
    for i in range(3000):
        f.write_bytes(mutated(goods[i%2], rng, i//2))
        before,start,watching = peak(),time.thread_time(),True
        try: load_model(f); how = 'loaded'
        except ValueError: how = 'refused'
        except Exception as e: how = f'{type(e).__name__}: {e}'
        watching = False
        times.append(1000*(time.thread_time()-start)); grown.append(peak()-before)
        ended[how] += 1
print(dict(ended))
print(f'slowest {max(times):.1f} ms of processor time, median {sorted(times)[1500]:.1f}; memory grew by at most {max(grown):.1f} MB')
print(f'executed or written: {dict(Counter(events)) or "nothing"}')
