/* In the place of xml.c's reader where vmcp is built without libxml2's headers. */
#include <errno.h>

#include "machine/xml.h"

int xml_parse(const char *what, const char *data, size_t length, struct xml_node **out, struct err *err)
{
	(void)data, (void)length;
	*out = NULL;
	err_set(err, ERR_HOST, ENOSYS, "%s: this vmcp was built without libxml2, which domain XML needs", what);
	return err_hint(err, "install libxml2-dev and build again, or write a guest.cfg");
}
