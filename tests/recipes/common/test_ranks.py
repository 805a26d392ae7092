"""`Processes`: what a job's processes do together that takes no second one to see."""

from torch import distributed as dist

from recipes.common.ranks import Processes


def test_the_process_group_is_left_at_the_end(tmp_path):
    processes = Processes("together")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    processes.leave()
    assert not dist.is_initialized()
    processes.leave()  # a process alone has none to leave
