// Cluster brings up a Kubernetes with snapmerge in it, for trying things by hand,
// and takes it down again at Ctrl-C. It is run in test/e2e, as root:
//
//	go run ./cmd/cluster [-kubernetes 1.36]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

func main() {
	cluster.Init()
	line := flag.String("kubernetes", "1.36", "line of Kubernetes")
	flag.Parse()
	if err := run(*line); err != nil {
		log.Fatal(err)
	}
}

func run(line string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := rig.Up(ctx, "../..", line, rig.Plain)
	if err == nil {
		cmd := c.Command(ctx, "kubectl")
		fmt.Printf("\nIn another terminal:\n\n  alias kubectl='KUBECONFIG=%s %s'\n\nCtrl-C takes it all down.\n", c.Kubeconfig(), strings.Join(cmd.Args, " "))
		<-ctx.Done()
	}
	if c != nil {
		err = errors.Join(err, c.Down())
	}
	return err
}
