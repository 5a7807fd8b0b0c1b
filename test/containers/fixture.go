package containers

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// images are the fixture's: one root file system under several configurations. The first is imported, the others are built on it.
var images = []struct {
	name    string
	changes []string
}{
	{"busybox", []string{`CMD ["sh"]`}},
	{"bare", []string{`CMD []`}},
	{"entry", []string{`ENTRYPOINT ["echo", "entry"]`, `CMD ["cmd", "two"]`}},
	{"shell", []string{`ENTRYPOINT echo shell $0 $1`, `CMD ["cmd"]`}},
	{"full", []string{`ENV A=image B="of the image"`, `LABEL from=image both=image`, `USER app`, `WORKDIR /home/app`, `EXPOSE 80/tcp 53/udp`,
		`VOLUME /data`, `STOPSIGNAL SIGUSR1`, `CMD ["id"]`}},
	{"healthy", []string{`HEALTHCHECK --interval=100ms --retries=2 CMD test -e /tmp/well`, `CMD ["sleep", "100"]`}},
}

// Images are the names of the fixture's images.
func Images() []string {
	var names []string
	for _, i := range images {
		names = append(names, i.name)
	}
	return names
}

// Import is a shell's script that makes the images, in either engine, from the root file system in the file rootfs.
func Import(rootfs string) string {
	script := "set -e; export DOCKER_BUILDKIT=0\n"
	for i, img := range images {
		if i == 0 {
			script += fmt.Sprintf("docker import -c '%s' %s %s\n", img.changes[0], rootfs, img.name)
			continue
		}
		script += fmt.Sprintf("docker build -q -t %s - <<'END'\nFROM %s\n%s\nEND\n", img.name, images[0].name, strings.Join(img.changes, "\n"))
	}
	return script
}

// WriteRootfs writes the fixture's root file system: Debian's busybox-static with a link for each applet, three users and what cases
// look at.
func WriteRootfs(w io.Writer) error {
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("%w (package busybox-static)", err)
	}
	list, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	tw := tar.NewWriter(w)
	add := func(h tar.Header, content string) {
		h.Size, h.ModTime, h.Format = int64(len(content)), time.Unix(1700000000, 0), tar.FormatPAX
		if err == nil {
			err = tw.WriteHeader(&h)
		}
		if err == nil {
			_, err = tw.Write([]byte(content))
		}
	}
	for _, d := range []struct {
		name  string
		mode  int64
		owner int
	}{{"bin", 0o755, 0}, {"data", 0o750, 1000}, {"etc", 0o755, 0}, {"home", 0o755, 0}, {"home/app", 0o755, 1000}, {"root", 0o700, 0}, {"tmp", 0o1777, 0}, {"usr", 0o755, 0}, {"var", 0o755, 0}} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d.name + "/", Mode: d.mode, Uid: d.owner, Gid: d.owner}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(bin))
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" { // the list contains it
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777}, "")
		}
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "data/seed", Mode: 0o640, Uid: 1000, Gid: 1000}, "from the image\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, "root:x:0:\nwheel:x:10:root,app\napp:x:1000:\naudio:x:29:app\nnogroup:x:65534:\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/crash", Mode: 0o755}, "no format that a kernel knows\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/plain", Mode: 0o644}, "not executable\n")
	if cerr := tw.Close(); err == nil {
		err = cerr
	}
	return err
}
