// Command serve serves the images that images/make made as a registry on a loopback address, for conex to use as the mirror
// of docker.io:
//
//	[registry."docker.io"]
//	mirrors = ["http://127.0.0.1:5000"]
package main

import (
	"cmp"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"conex/test/mirror"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:5000", "address to listen on")
	layout := flag.String("layout", filepath.Join(cmp.Or(os.Getenv("CONEX_IMAGES_CACHE"), ".cache/images"), "oci"), "the OCI layout to serve")
	flag.Parse()
	if err := serve(*addr, *layout); err != nil {
		fmt.Fprintln(os.Stderr, "serve:", err)
		os.Exit(1)
	}
}

func serve(addr, layout string) error {
	h, err := mirror.Handler(layout, func(r *http.Request) { log.Println(r.Method, r.URL.Path) })
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	log.Printf("serving %s on http://%s", layout, l.Addr())
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	return srv.Serve(l)
}
