import errno

import pytest

from experiment.reporting import full_disk_errors, input_errors


def test_a_disk_that_is_full_while_the_input_is_read_is_said_to_be_full():
    with pytest.raises(SystemExit, match="the disk is full, .* Free some space"), full_disk_errors(), input_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SystemExit, match="error: .*No such file"), full_disk_errors(), input_errors():
        raise OSError(errno.ENOENT, "No such file")
