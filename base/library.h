/*
 * Libraries that few commands need are loaded by those that do (dlopen(3)): every other start is shorter by the time that mapping and relocating them
 * takes, and a process that has no use for them does not carry them.
 *
 *	#define FUNCTIONS(X) X(slirp_new) X(slirp_cleanup)
 *	static struct { FUNCTIONS(LIBRARY_FIELD) } lib; // typed by the library's own header
 *	static const struct library libslirp = {"libslirp.so.0", LIBRARY_NAMES(FUNCTIONS)};
 *	const char *why = library_load(&libslirp, &lib); // then: lib.slirp_new(...)
 *
 * No more than one file, or one of a folder, knows a library in this way.
 */
#ifndef VMCP_BASE_LIBRARY_H
#define VMCP_BASE_LIBRARY_H

struct library {
	const char *file;	  /* its SONAME, which stands for the interface that the header has */
	const char *const *names; /* of functions, NULL behind the last */
};

#define LIBRARY_FIELD(name) __typeof__(name) *name;
#define LIBRARY_NAME(name)  #name,
/* At file scope only: a compound literal, which there lives as long as the program. */
#define LIBRARY_NAMES(functions) ((const char *const[]){functions(LIBRARY_NAME) NULL})

/*
 * Fills `functions`, a struct of as many pointers as there are names, in their order, unless that was done before. Any thread. The library is never
 * unloaded. NULL, or why it cannot be used: "is not installed", "is too old"; `functions` is then as it was.
 */
const char *library_load(const struct library *library, void *functions);

#endif
