package build

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"conex/internal/linux/mount"
	"conex/internal/ocispec"
	"conex/internal/runtime"
	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// A RUN of another platform needs nothing of us: the kernel hands its programs to the interpreter that is registered for them
// (binfmt_misc). What is here says why there is none.

// binfmtDir is where binfmt_misc shows its handlers.
const binfmtDir = "/proc/sys/fs/binfmt_misc"

// elfMachine is what an architecture's programs have in their header: class (32 or 64 bits), byte order, and machine (elf(5)).
type elfMachine struct {
	bits    int
	big     bool
	machine uint16
}

var elfMachines = map[string]elfMachine{
	"386": {32, false, 3}, "amd64": {64, false, 62}, "arm": {32, false, 40}, "arm64": {64, false, 183}, "loong64": {64, false, 258},
	"mips64": {64, true, 8}, "mips64le": {64, false, 8}, "ppc64": {64, true, 21}, "ppc64le": {64, false, 21}, "riscv64": {64, false, 243},
	"s390x": {64, true, 22},
}

// header is the beginning of an executable.
func (m elfMachine) header() []byte {
	h := []byte{0x7f, 'E', 'L', 'F', byte(m.bits / 32), 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, byte(m.machine), byte(m.machine >> 8)}
	if m.big {
		h[5], h[16], h[17], h[18], h[19] = 2, 0, 2, h[19], h[18]
	}
	return h
}

// runsHere reports whether the kernel itself runs an architecture's programs, as far as one can know.
func runsHere(local, arch string) bool {
	return local == arch || local == "amd64" && arch == "386" || local == "arm64" && arch == "arm"
}

// binfmt is a handler of binfmt_misc.
type binfmt struct {
	enabled     bool
	interpreter string
	flags       string
	offset      int
	magic, mask []byte
}

// parseBinfmt reads a handler's file; ok is false for what goes by a file's extension.
func parseBinfmt(data []byte) (b binfmt, ok bool) {
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		key, val, _ := strings.Cut(lines.Text(), " ")
		var err error
		switch key {
		case "enabled":
			b.enabled = true
		case "interpreter":
			b.interpreter = val
		case "flags:":
			b.flags = val
		case "offset":
			_, err = fmt.Sscanf(val, "%d", &b.offset)
		case "magic":
			b.magic, err = hex.DecodeString(val)
		case "mask":
			b.mask, err = hex.DecodeString(val)
		}
		if err != nil {
			return b, false
		}
	}
	return b, len(b.magic) > 0 && b.offset >= 0
}

// matches reports whether the handler is for files that begin so.
func (b *binfmt) matches(header []byte) bool {
	if b.offset+len(b.magic) > len(header) {
		return false
	}
	for i, m := range b.magic {
		mask := byte(0xff)
		if i < len(b.mask) {
			mask = b.mask[i]
		}
		if header[b.offset+i]&mask != m&mask {
			return false
		}
	}
	return true
}

// findBinfmt looks for a handler in dir, an enabled one first. nil when there is none.
func findBinfmt(dir string, m elfMachine) *binfmt {
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil
	}
	var found *binfmt
	for _, n := range names {
		data, err := os.ReadFile(n)
		if err != nil {
			continue // "register" can't be read
		}
		if b, ok := parseBinfmt(data); ok && b.matches(m.header()) && (found == nil || b.enabled && !found.enabled) {
			found = &b
		}
	}
	return found
}

// foreign says of a command that the kernel would not execute whether that is because it is another platform's.
func (x *execution) foreign(err *runtime.ExecError) error {
	if errors.Is(err.Err, runtime.ErrCommandNotFound) || !errors.Is(err.Err, unix.ENOEXEC) && !errors.Is(err.Err, unix.ENOENT) {
		return err
	}
	why := foreignReason(binfmtDir, platform(), x.platform, func(path string) bool {
		root, err := mount.Overlay(mount.OverlayOptions{Lower: x.lower})
		if err != nil {
			return true // nothing can be said
		}
		defer root.Close()
		_, err = safepath.Stat(root, path)
		return err == nil
	})
	if why == "" {
		return err
	}
	return fmt.Errorf("%w: %s", err, why)
}

// foreignReason says why programs of plat can't run on local; "" when they should. inImage looks for a file in the step's image.
func foreignReason(dir string, local, plat ocispec.Platform, inImage func(string) bool) string {
	m, known := elfMachines[plat.Architecture]
	if plat.Architecture == "" || runsHere(local.Architecture, plat.Architecture) {
		return ""
	}
	who := fmt.Sprintf("this machine is %s and can't run programs of %s", platformString(local), platformString(plat))
	if !known {
		return who
	}
	b := findBinfmt(dir, m)
	switch {
	case b == nil:
		why := who + ": no interpreter is registered for them"
		if entries, err := os.ReadDir(dir); err != nil || len(entries) == 0 {
			why += fmt.Sprintf(" (or none can be seen: binfmt_misc is not mounted at %s)", binfmtDir)
		}
		return why + `; "apt install qemu-user-static binfmt-support" registers QEMU`
	case !b.enabled:
		return fmt.Sprintf("%s: the interpreter %s is registered for them, but switched off in %s", who, b.interpreter, binfmtDir)
	case !strings.Contains(b.flags, "F") && !inImage(b.interpreter):
		return fmt.Sprintf("%s: the interpreter %s is registered for them without the flag F and is not in the image: register it with F, or copy it into the image",
			who, b.interpreter)
	}
	return ""
}
