"""The private names of PyTorch that are reached as attributes; those that are imported fail at import."""

import inspect

import pytest
import torch
from torch._dynamo import eval_frame
from torch._dynamo.convert_frame import CatchErrorsWrapper, ConvertFrame
from torch._inductor import cpp_builder
from torch.distributed import _composable_state
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group, _fsdp_state
from torch.nn.parallel import DistributedDataParallel

ATTRIBUTES = [
    (torch._C, "_current_graph_task_id", "which backward is running"),
    (torch.autograd.Variable._execution_engine, "queue_callback", "the end of a backward under FSDP"),
    (cpp_builder, "_get_openmp_args", "the OpenMP runtime of Inductor's own code"),
    (torch.amp.GradScaler, "_get_scale_async", "the loss scale without waiting for it"),
    (eval_frame, "_callback_from_stance", "graphs of their own inside gnsfx.measuring"),
    (ConvertFrame, "_clone_with_backend", "the same frame with another backend"),
    (DistributedDataParallel, "_get_active_ddp_module", "the wrapper whose forward is running"),
    (_composable_state, "_module_state_mapping", "the modules under fully_shard"),
    (_composable_state, "_get_module_state", "the state of one of them"),
]
MENTIONED = [  # set on instances, so looked for in the code that sets them
    (_fsdp_param.FSDPParam, ("sharded_param", "_unsharded_param", "unsharded_accumulated_grad", "is_dtensor")),
    (
        _fsdp_param_group.FSDPParamGroup,
        ("fsdp_params", "mesh_info", "gradient_divide_factor", "_partial_reduce_output"),
    ),
    (CatchErrorsWrapper, ("_torchdynamo_orig_backend", "hooks")),
    (DistributedDataParallel, ("_module_parameters", "process_group")),
]


@pytest.mark.parametrize(("owner", "name", "purpose"), ATTRIBUTES, ids=[a[1] for a in ATTRIBUTES])
def test_attributes(owner, name, purpose):
    assert hasattr(owner, name), f"{owner} has no {name} in torch {torch.__version__}: {purpose}"


@pytest.mark.parametrize(("owner", "names"), MENTIONED, ids=[m[0].__name__ for m in MENTIONED])
def test_attributes_of_instances(owner, names):
    source = inspect.getsource(owner)
    missing = [name for name in names if name not in source]
    assert not missing, f"{owner.__name__} no longer has {missing} in torch {torch.__version__}"


def test_the_state_of_fully_shard_holds_its_groups():
    names = [*dir(_fsdp_state.FSDPState), *_fsdp_state.FSDPState.__init__.__code__.co_names]
    assert {"_fsdp_param_groups", "_fsdp_param_group"} & set(names)
