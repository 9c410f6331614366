/* Preloaded into a program: shifts its wall clock by the nanoseconds that a file contains.

   GPTJ_CLOCK names the file: eight bytes in native byte order, which may change at any time.
   Monotonic clocks and sleeps are unaffected. A wait until a time of day is converted to the
   kernel's clock when it begins, so it lasts as long as intended. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

static const volatile long long *offset;

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("GPTJ_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *found = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (found != MAP_FAILED)
        offset = found;
}

static struct timespec moved(struct timespec when, long long by) {
    long long nanoseconds = when.tv_sec * SECOND + when.tv_nsec + by;
    return (struct timespec){nanoseconds / SECOND, nanoseconds % SECOND};
}

/* A time of day, as a program has computed it, by the kernel's clock. */
static struct timespec meant(const struct timespec *when) {
    return moved(*when, offset ? -*offset : 0);
}

static void *next(const char *name, const char *version) {
    void *found = dlvsym(RTLD_NEXT, name, version);
    return found ? found : dlsym(RTLD_NEXT, name);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        *now = moved(*now, *offset);
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    (void)zone;
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    *now = (struct timeval){found.tv_sec, found.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}

/* A deadline on the monotonic clock is seconds since boot: only a time of day exceeds 10^9. */
static int is_time_of_day(const struct timespec *when) { return when->tv_sec > 1000000000; }

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real)
        real = next("pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec converted = is_time_of_day(until) ? meant(until) : *until;
    return real(condition, mutex, &converted);
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    struct timespec converted = clock == CLOCK_REALTIME ? meant(until) : *until;
    return real(condition, mutex, clock, &converted);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*real)(pthread_mutex_t *, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    struct timespec converted = meant(until);
    return real(mutex, &converted);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real)
        real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec converted = meant(until);
    return real(semaphore, &converted);
}

/* Abseil, in Ray's C++, waits by futex calls of its own. */
long syscall(long number, ...) {
    static long (*real)(long, long, long, long, long, long, long);
    if (!real)
        real = dlsym(RTLD_NEXT, "syscall");
    long words[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        words[i] = va_arg(rest, long);
    va_end(rest);
    struct timespec converted;
    int by_time_of_day = (words[1] & FUTEX_CLOCK_REALTIME) != 0;
    if (number == SYS_futex && by_time_of_day && words[3]) {
        converted = meant((const struct timespec *)words[3]);
        words[3] = (long)&converted;
    }
    return real(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}
