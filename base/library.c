#include "base/library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>

static const char *load(const struct library *library, void **functions)
{
	void *handle = dlopen(library->file, RTLD_NOW | RTLD_LOCAL);

	if (!handle)
		return "is not installed";
	for (const char *const *name = library->names; *name; name++)
		if (!dlsym(handle, *name))
			return "is too old";
	for (unsigned i = 0; library->names[i]; i++)
		functions[i] = dlsym(handle, library->names[i]);
	return NULL;
}

const char *library_load(const struct library *library, void *functions)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	const char *why = NULL;

	pthread_mutex_lock(&lock);
	if (!*(void **)functions)
		why = load(library, functions);
	pthread_mutex_unlock(&lock);
	return why;
}
