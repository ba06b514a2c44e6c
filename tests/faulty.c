/* Preloaded into a process: where SMOE_TEST_LOCK_ERRNO is set, no file can be locked, and where SMOE_TEST_READ_ERRNO is, no
 * file can be read at an offset; the error has that number. Python's os.environ sets and unsets them while it runs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>

static int refused(const char *variable)
{
    const char *number = getenv(variable);
    if (number == NULL)
        return 0;
    errno = atoi(number);
    return 1;
}

#define LOCKS "SMOE_TEST_LOCK_ERRNO"
#define READS "SMOE_TEST_READ_ERRNO"
#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))

int flock(int descriptor, int operation)
{
    return refused(LOCKS) ? -1 : REAL(int (*)(int, int), "flock")(descriptor, operation);
}

int lockf(int descriptor, int command, off_t length)
{
    return refused(LOCKS) ? -1 : REAL(int (*)(int, int, off_t), "lockf")(descriptor, command, length);
}

ssize_t pread64(int descriptor, void *to, size_t size, off_t offset)
{
    return refused(READS) ? -1 : REAL(ssize_t(*)(int, void *, size_t, off_t), "pread64")(descriptor, to, size, offset);
}

ssize_t preadv64(int descriptor, const struct iovec *to, int count, off_t offset)
{
    return refused(READS) ? -1 : REAL(ssize_t(*)(int, const struct iovec *, int, off_t), "preadv64")(descriptor, to, count, offset);
}

ssize_t pread(int descriptor, void *to, size_t size, off_t offset)
{
    return pread64(descriptor, to, size, offset);
}

ssize_t preadv(int descriptor, const struct iovec *to, int count, off_t offset)
{
    return preadv64(descriptor, to, count, offset);
}

ssize_t preadv64v2(int descriptor, const struct iovec *to, int count, off_t offset, int flags)
{
    (void)flags;
    return preadv64(descriptor, to, count, offset);
}

ssize_t preadv2(int descriptor, const struct iovec *to, int count, off_t offset, int flags)
{
    return preadv64v2(descriptor, to, count, offset, flags);
}
