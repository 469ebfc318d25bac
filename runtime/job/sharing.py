"""Let a group share what jobs make: folders and files below a STAGE_PATH that the group may write.

In: a folder. Out: the umask of this process, or the modes of files. A user's umask of 022 would close to the group what
this process makes, and the next job that needs the checkpoint may be that of another member.

The name of who made something is in the guard's claims and manifests.
"""

import os
import pwd
import stat
from pathlib import Path

GROUP = stat.S_IRGRP | stat.S_IWGRP


def is_shared(folder: Path) -> bool:
    """Whether the group of the folder may write to it."""
    try:
        return bool(folder.stat().st_mode & stat.S_IWGRP)
    except OSError:
        return False


def share_new_files(stage: Path) -> None:
    """Leave the group its rights to what this process makes from now on, if `stage` is shared."""
    if is_shared(stage):
        os.umask(os.umask(0o777) & ~stat.S_IRWXG)


def share_tree(tree: Path) -> None:
    """Give the group its rights to a tree, if the folder above is shared. Some libraries make files for their user alone."""
    if not is_shared(tree.parent):
        return
    for path in [tree, *tree.rglob("*")]:
        mode = path.lstat().st_mode
        wanted = mode | GROUP | (stat.S_IXGRP if stat.S_ISDIR(mode) else 0)
        if wanted != mode and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(wanted))


def user_name(uid: int | None = None) -> str:
    """The name of a user, by default of this process. In an image, a user may have a number alone."""
    number = os.getuid() if uid is None else uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def owner_of(path: Path) -> str:
    """Whose file or folder it is."""
    return user_name(path.stat().st_uid)
