/*
 * What encrypted exports and encrypted stores need of libcrypto, apart, as its headers take names of base/err.h: AES-256-GCM, AES-256-XTS, scrypt and
 * HMAC. No thread but one at a time for one context. libcrypto is loaded by the first call; without it each fails.
 */
#ifndef VMCP_CHECKPOINT_STORE_SEAL_CRYPTO_H
#define VMCP_CHECKPOINT_STORE_SEAL_CRYPTO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SEAL_KEY_BYTES	 32u
#define SEAL_NONCE_BYTES 12u
#define SEAL_TAG_BYTES	 16u
#define SEAL_SALT_BYTES	 16u
/* Of scrypt: 64 MiB of memory and a fifth of a second. */
#define SEAL_LOG_N 16u
#define SEAL_R	   8u
#define SEAL_P	   1u

/* What to say behind "libcrypto" where a function has failed: "failed", or why it cannot be used. */
const char *seal_why_not(void);

struct seal_crypto;
struct seal_crypto *seal_crypto_new(void);	   /* NULL: libcrypto failed, or no memory */
void seal_crypto_free(struct seal_crypto *crypto); /* and forgets the key. NULL is allowed */
bool seal_random(void *data, size_t bytes);
/* What a file may ask for is bounded: nobody has vouched for it yet. */
bool seal_may_derive(unsigned log_n, unsigned r, unsigned p);
void seal_set_key(struct seal_crypto *crypto, const uint8_t key[SEAL_KEY_BYTES]);
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

#define SEAL_HMAC_BYTES 64u
/* HMAC-SHA512 of a text. */
bool seal_hmac(const uint8_t key[SEAL_KEY_BYTES], const char *text, uint8_t out[SEAL_HMAC_BYTES]);

/* Pages of 4096 bytes with AES-256-XTS (IEEE 1619), each a data unit of its own. */
#define SEAL_PAGES_KEY_BYTES 64u
#define SEAL_PAGE_BYTES	     4096
struct seal_pages;
struct seal_pages *seal_pages_new(const uint8_t key[SEAL_PAGES_KEY_BYTES], bool encrypt); /* NULL: libcrypto failed */
void seal_pages_free(struct seal_pages *pages);						   /* NULL is allowed */
/* In place. number: of the data unit. False: libcrypto failed. */
bool seal_page(struct seal_pages *pages, uint64_t number, void *data);

#endif
