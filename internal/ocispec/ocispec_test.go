package ocispec

import (
	"crypto/sha256"
	"strings"
	"testing"

	"conex/internal/ondemand"

	"github.com/opencontainers/go-digest"
)

// TestValidate holds that what is looked at here is what go-digest says.
func TestValidate(t *testing.T) {
	of := string(FromBytes(nil))
	for _, s := range []string{
		"", ":", "sha256:", "sha256", of, of[1:], of[:len(of)-1], of + "0", strings.ToUpper(of), strings.Replace(of, "e", "E", 1),
		strings.Replace(of, "e", "g", 1), of + "\n", "sha256:" + strings.Repeat("ab", 32), "sha256:" + strings.Repeat("-a", 32), "sha512:" + strings.Repeat("ab", 64), "sha512:ab",
		"md5:" + strings.Repeat("ab", 16), "sha256+b64:YWJj", "a b:c", "SHA256:" + of[7:], "sha256:sha256:" + of[7:64],
	} {
		err := Validate(Digest(s))
		ondemand.Digest()
		if want := Digest(s).Validate(); err != want {
			t.Errorf("%q: %v, go-digest says %v", s, err, want)
		}
		if d, perr := ParseDigest(s); perr != err || string(d) != s {
			t.Errorf("%q: parsed as %q, %v", s, d, perr)
		}
	}
}

func TestFrom(t *testing.T) {
	h := sha256.New()
	h.Write([]byte("conex"))
	ondemand.Digest()
	if a, b, want := FromBytes([]byte("conex")), FromHash(h), digest.FromString("conex"); a != want || b != want {
		t.Errorf("%s, %s, want %s", a, b, want)
	}
}
