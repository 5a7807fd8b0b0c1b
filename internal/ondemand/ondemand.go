// Package ondemand initialises some linked-in libraries when they are used first: most executions of conex never use them, and their
// initialisation before main was a quarter of what an execution costs (decision 55).
//
// Whoever calls one of them calls its function here before. The test holds who may import them.
package ondemand

import (
	"sync"

	"conex/internal/ondemand/held"
)

var forDigest, forDockerfile, forSSH, forCompress sync.Once

// Digest is to be called before go-digest looks at a digest's algorithm or form.
func Digest() { forDigest.Do(held.Digest.Initialise) }

// Dockerfile is to be called before BuildKit's Dockerfile packages are used.
func Dockerfile() { forDockerfile.Do(held.Dockerfile.Initialise) }

// SSH is to be called before golang.org/x/crypto/ssh and its agent are used.
func SSH() { forSSH.Do(held.SSH.Initialise) }

// Compress is to be called before readers and writers of gzip, zstd and xz are made.
func Compress() { forCompress.Do(held.Compress.Initialise) }
