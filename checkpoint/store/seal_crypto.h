/* What an encrypted export needs of libcrypto, apart, as its headers take names of base/err.h. AES-256-GCM, and scrypt. No thread but one at a time for one context. */
#ifndef VMCP_CHECKPOINT_STORE_SEAL_CRYPTO_H
#define VMCP_CHECKPOINT_STORE_SEAL_CRYPTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SEAL_KEY_BYTES	 32u
#define SEAL_NONCE_BYTES 12u
#define SEAL_TAG_BYTES	 16u

struct seal_crypto;
struct seal_crypto *seal_crypto_new(void);	   /* NULL: no memory */
void seal_crypto_free(struct seal_crypto *crypto); /* and forgets the key. NULL is allowed */
bool seal_random(void *data, size_t bytes);
/* Makes the key from a secret. False: libcrypto failed, or there is no memory for it. */
bool seal_derive(struct seal_crypto *crypto, const void *secret, size_t secret_bytes, const void *salt,
		 size_t salt_bytes, unsigned log_n, unsigned r, unsigned p);

struct seal_message {
	uint8_t nonce[SEAL_NONCE_BYTES]; /* never twice with one key */
	const uint8_t *extra;		 /* is authenticated, too */
	size_t extra_bytes;
	const uint8_t *in;
	size_t bytes;
	uint8_t *out; /* as long; may be `in` */
	uint8_t *tag; /* SEAL_TAG_BYTES: made, or checked */
};
bool seal_encrypt(struct seal_crypto *crypto, const struct seal_message *message);
/* 1; 0: the tag does not fit, and what is in `out` is not to be used; -1: libcrypto failed. */
int seal_decrypt(struct seal_crypto *crypto, const struct seal_message *message);

#endif
