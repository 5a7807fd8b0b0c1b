package seccomp

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"conex/internal/disk"
	"conex/internal/linux/caps"
)

// profileVersion is the version of the module that Default comes from; a test compares it with go.mod.
const profileVersion = "v0.2.4"

// Cached is Compile with a memory: the program lies in dir (made if need be), named by the hash of the profile. A file there
// that isn't whole is compiled and written again; when nothing can be written, the program is returned all the same.
func Cached(dir string, p *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	if p == nil {
		return nil, nil
	}
	b, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("hash seccomp profile: %w", err)
	}
	sum := sha256.Sum256(b)
	file := filepath.Join(dir, fmt.Sprintf("%s-%s-v%d.bpf", runtime.GOARCH, hex.EncodeToString(sum[:16]), compilerVersion))
	return cached(file, func() *specs.LinuxSeccomp { return p })
}

// CachedDefault returns the compiled default profile for a container with these capabilities. The key is what the profile
// depends on (kernel version, architecture, capabilities, version of the profile), so that the profile itself is neither
// built nor hashed when the program is there: 0.02 ms.
func CachedDefault(dir string, capNames []string) ([]unix.SockFilter, error) {
	mask, err := caps.Mask(capNames)
	if err != nil {
		return nil, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	// The profile distinguishes kernels by their first two numbers.
	release := unix.ByteSliceToString(uts.Release[:])
	major, rest, _ := strings.Cut(release, ".")
	minor := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		minor = rest[:i]
	}
	file := filepath.Join(dir, fmt.Sprintf("default-%s-%s.%s-%x-%s-v%d.bpf", runtime.GOARCH, major, minor, mask, profileVersion, compilerVersion))
	return cached(file, func() *specs.LinuxSeccomp { return Default(capNames) })
}

// A cache file: the magic, the SHA-256 of what follows, the instructions in the machine's byte order, 8 bytes each.
const (
	magic      = "conexbpf"
	headerSize = len(magic) + sha256.Size
	insnSize   = 8
)

func cached(file string, profile func() *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	if b, err := os.ReadFile(file); err == nil {
		if prog, ok := decode(b); ok {
			return prog, nil
		}
	}
	prog, err := Compile(profile())
	if err != nil {
		return nil, err
	}
	// The cache is a help, not a condition: with a full or read-only disk the container starts just the same, 0.5 ms later.
	// So the two errors below are answered by having compiled.
	if err := disk.WriteFile(file, encode(prog), 0o600, disk.Volatile); err != nil {
		if os.MkdirAll(filepath.Dir(file), 0o700) == nil {
			_ = disk.WriteFile(file, encode(prog), 0o600, disk.Volatile)
		}
	}
	return prog, nil
}

func encode(prog []unix.SockFilter) []byte {
	b := make([]byte, headerSize, headerSize+len(prog)*insnSize)
	copy(b, magic)
	for _, i := range prog {
		b = binary.NativeEndian.AppendUint16(b, i.Code)
		b = append(b, i.Jt, i.Jf)
		b = binary.NativeEndian.AppendUint32(b, i.K)
	}
	sum := sha256.Sum256(b[headerSize:])
	copy(b[len(magic):], sum[:])
	return b
}

// decode is encode's reverse; ok is false for a file that is not exactly what encode wrote.
func decode(b []byte) (prog []unix.SockFilter, ok bool) {
	if len(b) <= headerSize || !bytes.HasPrefix(b, []byte(magic)) || (len(b)-headerSize)%insnSize != 0 {
		return nil, false
	}
	body := b[headerSize:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], b[len(magic):headerSize]) {
		return nil, false
	}
	prog = make([]unix.SockFilter, 0, len(body)/insnSize)
	for ; len(body) > 0; body = body[insnSize:] {
		prog = append(prog, unix.SockFilter{
			Code: binary.NativeEndian.Uint16(body), Jt: body[2], Jf: body[3], K: binary.NativeEndian.Uint32(body[4:]),
		})
	}
	if len(prog) > unix.BPF_MAXINSNS {
		return nil, false
	}
	return prog, true
}
